"""What FFmpeg may open of files that somebody else made. It would also read playlists, which lead to other files."""

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}  # of `av.open`
