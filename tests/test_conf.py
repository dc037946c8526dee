"""Every shipped YAML composes, and everything that a CPU can instantiate is instantiated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

import sphinx_pl.runtime.hydra_app  # noqa: F401  (registers the resolvers)
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import ImageRef, Record
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER, entry_point

entry_point("train")(lambda cfg: None)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml") if not path.stem.startswith("_"))


@pytest.fixture(autouse=True)
def _fresh_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield


def composed(config: str, *overrides: str, folder: str = "outputs/test") -> DictConfig:
    cfg = compose(config, overrides=list(overrides), return_hydra_config=True)
    cfg.hydra.runtime.output_dir = folder
    HydraConfig.instance().set_config(cfg)
    return cfg


MODELS = [name for name in options("model") if name != "auto"]
"""The models with sizes of their own."""


def test_no_group_is_empty() -> None:
    groups = ("stage", "model", "data", "data/mixture", "trainer", "callbacks", "logger", "experiment", "debug")
    assert all(options(group) for group in groups)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_valid(name: str) -> None:
    model = SphinxConfig.from_dict(composed("train", f"model={name}").model)
    assert model.name == name
    assert model.tokens_per_image > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_finetunes_with_the_papers_data(name: str) -> None:
    """One image and a question fit into the sample's limit, the decoder's positions and a row."""
    cfg = composed("train", "experiment=paper_finetune", f"model={name}")
    model, data = SphinxConfig.from_dict(cfg.model), cfg.data
    tokenizer = Path(__file__).parent / "golden" / "tokenizer.model"
    processor = Processor.from_dict(OmegaConf.to_container(data.processor), tokenizer, model)  # type: ignore[arg-type]
    record = Record("k", "short_vqa", (ImageRef("a.png"),), ((640, 480),), question="What is it?", answer="a dog")
    sample = processor.sample(record, "source")
    assert sample.length <= min(processor.max_length, model.decoder.max_positions, data.packing.row_length)
    assert processor.to_dict()["max_length"] == processor.max_length


@pytest.mark.parametrize("name", options("stage"))
def test_stages_resolve(name: str) -> None:
    cfg = composed("train", f"stage={name}", "experiment=none")
    values = OmegaConf.to_container(cfg.stage, resolve=True)
    assert values["name"] == name
    assert get_class(values["_target_"]).__name__ == "Stage"
    assert values["max_steps"] > 0


def is_paper(experiment: str) -> bool:
    """Return whether the experiment brings its own stage, which tests/data/test_paper.py tests."""
    return experiment.startswith("paper_")


@pytest.mark.parametrize(
    "experiment", [name for name in options("experiment") if name != "none" and not is_paper(name)]
)
@pytest.mark.parametrize("stage", options("stage"))
def test_experiments_resolve_for_every_stage(experiment: str, stage: str) -> None:
    cfg = composed("train", f"experiment={experiment}", f"stage={stage}")
    OmegaConf.to_container(cfg.stage, resolve=True)
    OmegaConf.to_container(cfg.data, resolve=True)
    assert cfg.name == experiment
    assert sum(source.weight for source in cfg.data.sources.values() if source) == pytest.approx(1)


@pytest.mark.parametrize("name", options("trainer"))
def test_trainers_resolve_and_build(name: str) -> None:
    cfg = composed("train", f"trainer={name}", "stage.max_steps=10", "stage.accumulate=2", "stage.val_every=5")
    assert cfg.trainer.val_check_interval == 10
    if cfg.trainer.accelerator != "gpu":
        trainer = instantiate(cfg.trainer, logger=False, accelerator="cpu")
        assert trainer.max_steps == 10


@pytest.mark.parametrize("name", options("callbacks"))
def test_callbacks_build(name: str) -> None:
    cfg = composed("train", f"callbacks=[{name}]", "data.root=/nowhere")
    built = [instantiate(entry) for entry in cfg.callbacks.values() if entry]
    assert built


@pytest.mark.parametrize("name", options("logger"))
def test_loggers_build(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = composed("train", f"logger={name}", folder=str(tmp_path))
    assert [instantiate(entry) for entry in cfg.logger.values() if entry]


@pytest.mark.parametrize("name", options("debug"))
def test_debug_presets_compose(name: str) -> None:
    OmegaConf.to_container(composed("train", f"debug={name}").stage, resolve=True)


@pytest.mark.parametrize("script", ["train", "mix_weights", "evaluate", "chat"])
def test_entry_scripts_compose(script: str) -> None:
    assert composed(script)


def test_the_samples_benchmarks_lie_with_the_sample() -> None:
    def files(config: str, *overrides: str) -> set[str]:
        benchmark = composed(config, *overrides).benchmark
        return {entry.src for name, entry in benchmark.items() if name.startswith("sample_")}

    assert files("evaluate") == {"data/sample/instructions/test.json"}
    assert files("evaluate", "data.root=elsewhere") == {"elsewhere/instructions/test.json"}
    assert files("train", "+benchmark=paper", "data.root=elsewhere") == {"elsewhere/instructions/test.json"}
    # The user's own data may lack such a key.
    assert files("evaluate", "~data.tokenizer", "~data.test", "~data.root") == {"data/sample/instructions/test.json"}


def test_the_slurm_launcher_submits_its_options(tmp_path: Path) -> None:
    from hydra.core.plugins import Plugins
    from submitit.slurm.slurm import _make_sbatch_string

    sizes = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=8", "hydra.launcher.gpus_per_node=8"]
    whose = ["hydra.launcher.partition=gpu", "hydra.launcher.account=me", "hydra.launcher.qos=high"]
    lines = ["hydra.launcher.setup=[module load cuda]", "hydra.launcher.timeout_min=90"]
    cfg = composed("train", "hydra/launcher=slurm", "stage=finetune", *sizes, *whose, *lines)
    values = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert values["name"] == "demo-finetune"
    launcher = Plugins.instance()._instantiate(cfg.hydra.launcher)
    assert type(launcher).__name__ == "SlurmLauncher"
    # submitit knows every key; an unknown one fails here, not after the submission.
    renamed = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
    options = {renamed.get(key, key): value for key, value in values.items()}
    for key in ("_target_", "submitit_folder", "max_num_timeout"):
        options.pop(key)
    script = _make_sbatch_string("command", tmp_path, map_count=2, **options).splitlines()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=90", "signal=USR2@300", "requeue"):
        assert f"#SBATCH --{line}" in script
    assert "#SBATCH --array=0-1%2" in script
    assert script.index("module load cuda") < len(script) - 1
