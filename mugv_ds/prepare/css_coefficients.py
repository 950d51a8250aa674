"""The coefficients of the colour–structure score, as tools/fit_css.py writes them."""

# Fitted on shots that are joined at random, with stated seeds, by 234 cuts, dissolves, fades and wipes. Some of the
# shots are of trailer_bbb.mp4, bigbuckbunny.mp4, carphone_pristine.mp4, bikes.mp4, world.mp4,
# WolfgangLanger_Pexels.mp4, noface_face.mov; the others are drawn. With the default config it gave:
# - fitted on half 0, tested on the other: 2 of 60 clips contaminated (3%), 49% of the frames kept; missed: none.
# - fitted on half 1, tested on the other: 2 of 53 clips contaminated (4%), 48% of the frames kept; missed: none.
# - fitted and tested on all: 5 of 115 clips contaminated (4%), 49% of the frames kept; missed: none.
# Lag in seconds → constant, coefficient of the colour, coefficient of the structure.
COEFFICIENTS: dict[float, tuple[float, float, float]] = {
    0.041666666666666664: (7.368, -6.925, -6.958),
    0.3333333333333333: (8.316, -10.405, -3.867),
    1.0: (6.837, -9.764, -2.87),
}
