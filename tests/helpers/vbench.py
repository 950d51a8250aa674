"""A suite with the counts of VBench-I2V's, and an environment in which a package answers that judges nothing."""

import json
import sys
import venv
from pathlib import Path

from PIL import Image

from mugv_ds.evaluation.vbench import CAMERA, DIMENSIONS, Suite

_SUBJECT = ["i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree"]
_BACKGROUND = ["i2v_background", "background_consistency"]
_BOTH = ["aesthetic_quality", "imaging_quality", "temporal_flickering"]

# The class as the package has it: it reads the images of the crop by a path of the working folder, looks for videos by
# name, and writes what it found. camera_motion imports what the wheel leaves out.
_PACKAGE = """
import importlib, json, os, pathlib
class VBenchI2V:
    def __init__(self, device, info, out):
        os.makedirs(out, exist_ok=True)
        self.info, self.out = info, out
    def evaluate(self, videos_path, name, dimension_list, local, resolution, imaging_quality_preprocessing_mode):
        (dimension,) = dimension_list
        importlib.import_module("vbench2_beta_i2v.dimension")
        judged = []
        for pair in json.load(open(self.info)):
            if dimension not in pair["dimension"]:
                continue
            assert os.path.isfile(f"vbench2_beta_i2v/data/crop/{resolution}/" + pair["image_name"])
            for number in range(5):
                path = os.path.join(videos_path, f"{pair['prompt_en']}-{number}.mp4")
                assert os.path.getsize(path) > 0
                judged.append({"video_path": path, "video_results": 0.5})
        with open(os.path.join(os.environ["VBENCH_CACHE_DIR"], "calls"), "a") as calls:
            calls.write(f"{dimension} {local} {os.environ.get('PYTHONPATH') in __import__('sys').path}\\n")
        result = json.load(open(os.path.join(os.environ["VBENCH_CACHE_DIR"], "answers.json")))[dimension]
        if result is None:
            raise NotImplementedError(f"UnImplemented dimension {dimension}!")
        json.dump({dimension: [result, judged]}, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
"""
_DIMENSION = "from vbench2_beta_i2v.third_party.cotracker.utils.visualizer import Visualizer\n"


def suite_info() -> list[dict]:
    """The content of a file like `vbench2_i2v_full_info.json`: as many pairs of each dimension, other prompts."""
    info = []
    for number in range(109):
        place, image = f"a place, number {number}", f"a place, number {number}.png"
        info.append({"prompt_en": place, "dimension": [*_BACKGROUND, *_BOTH], "image_name": image})
        info += [
            {"prompt_en": f"{place}, camera {move}", "dimension": ["camera_motion"], "image_name": image}
            for move in CAMERA
        ]
    for number in range(246):
        animal = f"an animal, number {number}"
        info.append({"prompt_en": animal, "dimension": [*_SUBJECT, *_BOTH], "image_name": f"{animal}.png"})
    return info


def write_crops(suite: Suite, folder: Path, crop: str = "16-9") -> None:
    """Writes small images for all pairs of a suite."""
    (folder / crop).mkdir(parents=True)
    for number, image in enumerate(dict.fromkeys(pair.image for pair in suite.pairs)):
        Image.new("RGB", (16, 9), (number % 256, 80, 160)).save(folder / crop / image)


def write_package(environment: Path, cache: Path, answers: dict[str, float | None]) -> None:
    """Makes an environment whose package answers so, and a cache in which its weights lie. None: it fails."""
    venv.create(environment, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    package = environment / "lib" / version / "site-packages" / "vbench2_beta_i2v"
    package.mkdir()
    (package / "__init__.py").write_text(_PACKAGE)
    (package / "dimension.py").write_text(_DIMENSION)
    for weights in (name for dimension in DIMENSIONS for name in dimension.weights):
        (cache / weights).parent.mkdir(parents=True, exist_ok=True)
        (cache / weights).touch()
    (cache / "answers.json").write_text(json.dumps(answers))
