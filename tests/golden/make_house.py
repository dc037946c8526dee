"""Makes tests/golden/house: a stopped run and its model, as the code wrote them before configuration keys were renamed.

    python tests/golden/make_house.py FOLDER

It was run at commit 0488114 and works with that commit's keys only. `run/` stopped after 4 of 8 steps; `losses.csv`
has the training losses of the same run without a stop. FOLDER holds everything by relative paths.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent.parent
VIT = {"image_size": 32, "patch_size": 16, "width": 8, "layers": 1, "heads": 2}
MODEL = [
    *("model.decoder.width=8", "model.decoder.layers=1", "model.decoder.heads=2", "model.decoder.kv_heads=1"),
    *("model.decoder.ffn_width=8", "model.vision.image_size=96", "model.vision.grid=3", "model.vision.merge=none"),
    *("model.vision.merge_factor=1", "+model.vision.skip_padding=true"),
    *(f"model.vision.clip.{key}={value}" for key, value in VIT.items()),
    *(f"model.vision.{name}=null" for name in ("convnext", "dinov2", "qformer")),
]
DATA = [
    *("data.root=data", "data.tokenizer=data/tokenizer.model", "data.mixing.lanes=2", "data.mixing.temperature=2"),
    *("data.packing.rows=2", "data.packing.row_length=192", "data.val_samples=4"),
    "~data/mixture",
    "+data.sources={asked:{kind:instructions,path:data/asked.json,branches:3},"
    "text:{kind:text,path:data/text.jsonl,caps:{text:30}}}",
    "+data.val_sources={asked:{kind:instructions,path:data/asked.json}}",
]
RUN = [
    *("stage=finetune", "experiment=none", "name=house", "stage.init_from=null", "output_dir=.", "stage.max_steps=8"),
    *("stage.train_parts=[decoder,projections,clip]", "stage.rows_per_step=4", "stage.optim.lr=1e-3"),
    *("stage.val_every=0", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.precision=32-true"),
    *("logger.csv.flush_every_n_steps=1", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=1"),
]


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(REPOSITORY / "tests" / "golden" / "tokenizer.model", folder / "tokenizer.model")
    random = np.random.default_rng(0)
    for name, size in (("a", (40, 16)), ("b", (24, 40))):
        noise = random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    asked = []
    for i in range(24):
        entry = {"image": f"{'ab'[i % 2]}.png", "question": f"number {i}?", "answer": "no" if i % 3 else "yes"}
        if i % 4 == 0:
            width, height = ((40, 16), (24, 40))[i % 2]
            place = {"task": "rec", "question": f"thing {i}", "regions": [{"box": [1, 2, 9, 11], "label": "thing"}]}
            entry = {"image": entry["image"], "width": width, "height": height} | place
        asked.append(entry)
    (folder / "asked.json").write_text(json.dumps(asked))
    lines = [json.dumps({"text": f"sentence number {i} of a text"}) + "\n" for i in range(40)]
    (folder / "text.jsonl").write_text("".join(lines))


def train(folder: Path, run: str, *more: str) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), *RUN, *MODEL, *DATA, f"run={run}", *more]
    subprocess.run(command, cwd=folder, check=True)


def main(folder: Path) -> None:
    make_data(folder / "data")
    train(folder, "straight")
    train(folder, "run", "trainer.max_steps=4")
    (folder / "straight" / "metrics.csv").rename(folder / "losses.csv")
    (folder / "straight" / "model").rename(folder / "model")
    shutil.rmtree(folder / "straight")
    shutil.rmtree(folder / "run" / "model", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
