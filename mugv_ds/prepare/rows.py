"""The columns of the fragments: what each step writes, and the steps after it read."""

import pyarrow as pa

_f = pa.float32()
_d = pa.float64()
_i = pa.int32()
_s = pa.string()
_hashes = pa.list_(pa.uint64())

# One row a file that has the content of another, whose path comes first in order.
COPY = pa.schema([("path", _s), ("video", _s)])

# One row a video that was probed. Where `error` is set, nothing after `detail` need be.
VIDEO = pa.schema(
    [
        ("video", _s),  # hex SHA-256 of the file
        ("path", _s),  # relative to the folder of videos; the first in order of those with this content
        ("bytes", pa.int64()),
        ("error", _s),  # a reason's name, such as unreadable; null where it was decoded to its end
        ("detail", _s),  # what was found, for people
        ("codec", _s),
        ("pixel_format", _s),
        ("width", _i),  # of decoded frames, before rotation and sample aspect ratio
        ("height", _i),
        ("sample_aspect", _d),  # width ÷ height of a pixel
        ("rotation", _i),  # degrees counter-clockwise by which frames are turned for display: 0, 90, 180 or 270
        ("matrix", _s),  # of the colours: bt601, bt709 or bt2020
        ("full_range", pa.bool_()),
        ("hdr", pa.bool_()),
        ("audio", pa.bool_()),
        ("time_base", _d),  # seconds of a unit of pts
        ("claimed", _d),  # duration that the header claims, in seconds; null where it claims none
        ("duration", _d),  # of what was decoded, in seconds
        ("frames", _i),
        ("fps", _d),  # mean, by pts
        ("vfr", _d),  # standard deviation ÷ mean of the frame intervals
        ("bitrate", _d),  # bits a pixel
        ("interlaced", _d),  # share of the first 50 frames
        # One value a frame:
        ("pts", pa.list_(pa.int64())),
        ("content", pa.list_(_f)),  # PySceneDetect's content value
        ("css", pa.list_(pa.list_(_f))),  # colour–structure score, for each lag; positive means another shot
        ("transnet", pa.list_(_f)),  # null where it did not run
        ("luma", pa.list_(_f)),  # mean, in [0, 1]
        ("luma_range", pa.list_(_f)),  # in [0, 255]
        ("dark", pa.list_(_f)),  # share of pixels
        ("bright", pa.list_(_f)),
        ("difference", pa.list_(_f)),  # to the frame before, mean absolute at 160 × 90, in [0, 255]
        ("shift_x", pa.list_(_f)),  # against the frame before, as a share of the short side
        ("shift_y", pa.list_(_f)),
        # One value a sample; there is one every probe.interval seconds:
        ("sample", pa.list_(_i)),  # its frame
        ("sharp", pa.list_(_f)),
        ("flow", pa.list_(_f)),  # mean magnitude from here to the next sample, in pixels; NaN for the last
        ("border", pa.list_(pa.list_(_f))),  # top, bottom, left, right: of each the share of the side that is flat
        ("border_level", pa.list_(pa.list_(_f))),  # their luma
        ("border_edge", pa.list_(pa.list_(_f))),  # share of the line where the picture beside it differs
        ("phash", _hashes),  # 0 for a flat frame, which has none
        ("phash_mirror", _hashes),
    ]
)

SIDES = ("top", "bottom", "left", "right")

# One row a clip, and one a rest of a scene that is too short to be one.
CLIP = pa.schema(
    [
        ("clip", _s),  # 32 hex digits of (video, first pts, last pts, crop)
        ("video", _s),
        ("reason", _s),  # too_short_scene, or null; where it is set, nothing from sharp_min on need be
        ("first_pts", pa.int64()),
        ("last_pts", pa.int64()),
        ("start", _d),  # seconds from the video's first frame
        ("duration", _d),
        ("frames", _i),
        ("fps", _d),
        *((f"crop_{side}", _i) for side in SIDES),  # lines of the decoded frame that are cut away
        ("width", _i),  # in pixels as shown: cropped, turned, and with square pixels
        ("height", _i),
        ("sharp_min", _d),
        ("sharp_med", _d),
        ("sharp_max", _d),
        ("motion", _d),
        ("motion_min", _d),
        ("motion_max", _d),
        ("area", _d),  # share of the picture that the crop leaves
        *((f"border_{side}", _d) for side in SIDES),
        *((f"border_edge_{side}", _d) for side in SIDES),
        ("repeated", _d),
        ("shake", _d),
        ("luma", _d),
        ("dark", _d),
        ("bright", _d),
        ("phash", _hashes),  # of 8 frames, evenly spaced
        ("phash_mirror", _hashes),
    ]
)

# One row a clip and bucket; and one a clip that no bucket takes, with `bucket` null and the bound that it fails.
FIT = pa.schema(
    [
        ("clip", _s),
        ("bucket", _s),
        ("name", _s),  # too_small, too_short, crops_too_much or fps_too_low
        ("value", _d),
        ("low", _d),
        ("high", _d),
        ("area", _d),  # share of the picture that the bucket leaves
        ("time_error", _d),  # largest distance of a frame from the time that it stands for, in seconds
        ("repeated", _d),  # share of the sample's frames that are the one before once more
        ("pts", pa.list_(pa.int64())),  # of the sample's frames
    ]
)

# One row a clip and bucket, or a clip's caption; a unit becomes a shard. Rows are added and never change.
ENCODE_PLAN = pa.schema([("unit", _i), ("bucket", _s), ("clip", _s), ("part", _i)])  # part: unit of videos
EMBED_PLAN = pa.schema([("unit", _i), ("clip", _s), ("part", _i)])

# One row a clip of a unit, in the order of the ids; `shard` is null where `error` says why there is no latent.
ENCODE = pa.schema(
    [
        ("clip", _s),
        ("bucket", _s),
        ("error", _s),
        ("shard", _s),  # relative to the folder of the set
        ("bytes", pa.int64()),  # of the shard
        ("sha256", _s),  # of the shard
        ("luma", _d),  # mean of the encoded pixels, in [0, 1]
    ]
)
EMBED = pa.schema(
    [
        ("clip", _s),
        ("error", _s),
        ("shard", _s),
        ("bytes", pa.int64()),
        ("sha256", _s),
        ("tokens", _i),  # that are stored
        ("cut", _i),  # that the caption has beyond them
    ]
)

GATE = pa.schema([("clip", _s), ("open", pa.bool_())])

# One row a clip that the gate let in; `error` says in words why a clip has no result.
TEXT = pa.schema([("clip", _s), ("overlay", _d), ("overlay_bottom", _d), ("texts", pa.list_(_s)), ("error", _s)])
AESTHETIC = pa.schema([("clip", _s), ("aesthetic", _d), ("embedding", pa.list_(pa.float16())), ("error", _s)])
SAFETY = pa.schema([("clip", _s), ("nsfw", _d), ("faces", _i), ("error", _s)])
VLM = pa.schema(
    [
        ("clip", _s),
        ("answers", pa.list_(pa.struct([("question", _s), ("yes", _d)]))),  # share of the windows that say yes
        ("model", _s),
        ("error", _s),
    ]
)
CAPTION = pa.schema(
    [
        ("clip", _s),
        ("caption", _s),
        ("reason", _s),  # caption_empty and the like, or null
        ("source", _s),  # file, sidecar, or the model's name
        ("prompt", _s),  # hash of the prompt; null where a person wrote the caption
        ("error", _s),
    ]
)
TAGS = pa.schema([("clip", _s), ("tags", pa.list_(_s)), ("error", _s)])  # class:value

REASON = pa.struct([("step", _s), ("field", _s), ("name", _s), ("value", _d), ("low", _d), ("high", _d)])
# One row a clip; and, with `clip` null, one a video that has no clips and one a copy of a file, so that every file has
# its reason.
SELECT = pa.schema(
    [
        ("clip", _s),
        ("video", _s),
        ("path", _s),  # of the video, or of the copy
        ("licence", _s),  # of the row of screen.sources that fits the path, as is the origin; null where none does
        ("origin", _s),
        ("accepted", pa.bool_()),
        ("reasons", pa.list_(REASON)),
        ("composite", _d),  # in [0, 1]; null where none of its scores is there
        ("group", _s),  # the first tag of class balance.group
        ("weight", _d),  # null where the clip is not accepted
    ]
)
# Pairs that are alike, of different videos: of the many that may be, as many as join what belongs together.
# kind: picture, mirror, caption or embedding. distance: mean of the frames' bits; of embedding, the cosine.
PAIR = pa.schema([("a", _s), ("b", _s), ("kind", _s), ("distance", _d)])
# One row a clip that gives way to the clip `of`. kind: as above, or source (too many alike of one video).
# distance: of the nearest pair of the clip, which need not be with `of`.
DUPLICATE = pa.schema([("clip", _s), ("of", _s), ("kind", _s), ("distance", _d)])
# One row a clip that people labelled.
LABEL = pa.schema([("clip", _s), ("label", _s), ("pair_id", _s), ("rank", _i)])

# One row a sample, in the order of train.csv and val.csv, whose rows alternate.
PROVENANCE = pa.schema(
    [
        ("sample", _s),
        ("set", _s),  # train or val
        ("clip", _s),
        ("bucket", _s),
        ("video", _s),
        ("path", _s),  # relative to the folder of videos
        ("licence", _s),
        ("origin", _s),
        ("first_pts", pa.int64()),  # of the clip
        ("last_pts", pa.int64()),
        ("start_pts", pa.int64()),  # of the sample's first frame
        *((f"crop_{side}", _i) for side in SIDES),
        ("left", _d),  # share of the picture that the bucket leaves
        ("time_error", _d),  # as in FIT
        ("repeated_frames", _d),
        ("pixel_luma", _d),  # mean of the encoded pixels, in [0, 1]
        ("tokens", _i),
        ("cut_tokens", _i),
        ("caption_source", _s),
        ("composite", _d),
        *((name, _d) for name in ("sharp_min", "sharp_med", "sharp_max", "motion", "motion_min", "motion_max")),
        *((name, _d) for name in ("repeated", "shake", "luma", "dark", "bright", "area")),
        ("phash", _hashes),
        ("overlay", _d),
        ("aesthetic", _d),
        ("nsfw", _d),
        ("faces", _i),
        ("latent_shard", _s),
        ("text_shard", _s),
    ]
)
