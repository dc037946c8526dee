"""Every key is read or refused, in files as on the command line, and every number has bounds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from sphinx_pl.cli.data import composed as composed_for_data
from sphinx_pl.pipeline.recipe import compose_pipeline
from sphinx_pl.runtime.overrides import CONFIG_FOLDER, check_packages, compose_config, explain_override, one_line
from sphinx_pl.settings.evaluate import check_evaluate
from sphinx_pl.settings.mix_weights import check_mix
from sphinx_pl.settings.train import TRAINER_OURS, TRAINER_WORKS, StageConfig, check_train, stage_keys
from sphinx_pl.utils.errors import UserError, nearest_key

CHECKS = {"train": check_train, "evaluate": check_evaluate, "mix_weights": check_mix}


@pytest.fixture(autouse=True)
def _fresh_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def composed(script: str, *overrides: str) -> DictConfig:
    cfg = compose_config(CONFIG_FOLDER, script, overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


shipped = functools.cache(composed)  # its results are copied before they are changed
TRAIN = shipped("train", "trainer=cpu")


def refusal(script: str, changes: str) -> str:
    """Return the error of a configuration with changes in YAML, as an experiment file would make
    them.
    """
    base = TRAIN.copy() if script == "train" else shipped(script).copy()
    OmegaConf.set_struct(base, False)  # as a file may add keys
    cfg = OmegaConf.merge(base, OmegaConf.create(changes))
    assert isinstance(cfg, DictConfig)
    with pytest.raises(UserError) as error_info:
        CHECKS[script](cfg)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


@pytest.mark.parametrize("stage", ["pretrain_real", "finetune", "one_stage"])
@pytest.mark.parametrize("experiment", ["none", "demo", "sample_full"])
def test_shipped_configurations_are_read(stage: str, experiment: str) -> None:
    check_train(composed("train", f"stage={stage}", f"experiment={experiment}"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=paper_finetune", "trainer=zero3_offload", "logger=wandb"],
        ["experiment=paper_pretrain_synthetic", "trainer=fsdp2", "logger=tensorboard", "+benchmark=paper"],
        ["debug=overfit", "trainer=ddp"],
        ["debug=one_batch", "callbacks=[default,predictions]"],
        ["debug=profiler", "+trainer.max_time=00:00:01:00", "+trainer.detect_anomaly=true"],
        ["+data.augment.min_area=0.3", "+data.sources.answers.ratio=0.5", "stage=finetune"],
    ],
    ids=" ".join,
)
def test_optional_keys_and_shipped_choices_are_read(overrides: list[str]) -> None:
    check_train(composed("train", *overrides))


@pytest.mark.parametrize("script", ["evaluate", "mix_weights"])
def test_other_scripts_read_the_shipped_configurations(script: str) -> None:
    CHECKS[script](composed(script))
    CHECKS[script](composed(script, "data=paper"))


@pytest.mark.parametrize(
    ("changes", "wrong", "right"),
    [
        ("overwite: true", "overwite", "overwrite"),
        ("seeds: 3", "seeds", "seed"),
        ("max_epochs: 1", "max_epochs", "data.mixing.epochs"),
        ("lr: 1e-4", "lr", "stage.optim.lr"),
        ("data: {augmnet: {flip: 0.5}}", "data.augmnet", "data.augment"),
        ("data: {max_skiped: 0.5}", "data.max_skiped", "data.max_skipped"),
        ("data: {workerz: 2}", "data.workerz", "data.workers"),
        ("data: {val_sample: 4}", "data.val_sample", "data.val_samples"),
        ("data: {batch_size: 4}", "data.batch_size", "data.packing.micro_batch_rows"),
        ("data: {packing: {row: 4}}", "data.packing.row", "data.packing.row_length"),
        ("data: {processor: {decimal: 4}}", "data.processor.decimal", "data.processor.decimals"),
        ("data: {mixing: {unti: token}}", "data.mixing.unti", "data.mixing.unit"),
        ("data: {augment: {filp: 0.1}}", "data.augment.filp", "data.augment.flip"),
        ("stage: {max_step: 5}", "stage.max_step", "stage.max_steps"),
        ("stage: {optim: {learning_rate: 5}}", "stage.optim.learning_rate", "stage.optim.lr"),
        ("model: {decoder: {widht: 5}}", "model.decoder.widht", "model.decoder.width"),
        (
            "model: {vision: {encoders: {clip: {layer: 5}}}}",
            "model.vision.encoders.clip.layer",
            "model.vision.encoders.clip.layers",
        ),
        ("model: {vision: {clip: null}}", "model.vision.clip", "model.vision.encoders.clip"),
        ("trainer: {max_tim: 5}", "trainer.max_tim", "trainer.max_time"),
        ("callbacks: {checkpoint: {every: 5}}", "callbacks.checkpoint.every", "callbacks.checkpoint.keep_every"),
        ("logger: {csv: {savedir: x}}", "logger.csv.savedir", "logger.csv.save_dir"),
        ("plan_for: {gpus: x}", "plan_for.gpus", "plan_for.gpu"),
        ("recipe: {finetune: {max_step: 5}}", "recipe.finetune.max_step", "recipe.finetune.max_steps"),
    ],
)
def test_an_unknown_key_of_a_file_is_refused_with_the_nearest(changes: str, wrong: str, right: str) -> None:
    assert refusal("train", changes) == f"there is no key {wrong}: did you mean {right}?"


def test_an_unknown_encoder_is_refused_with_the_nearest_and_the_kinds_of_others() -> None:
    key = "model.vision.encoders.clpi"
    assert refusal("train", "model: {vision: {encoders: {clpi: {}}}}").startswith(
        f"there is no key {key}: did you mean model.vision.encoders.clip? A key of your own needs {key}.kind=clip|"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("callbacks: {checkpont: {every_n_steps: 5}}", "callbacks.checkpont has no _target_: did you mean"),
        ("data: {sources: {reel: {weight: 0.5}}}", "data.sources.reel has no kind and no path: did you mean"),
        ("data: {sources: {real: {weigth: 0.5}}}", "data.sources.real of kind image_text has no option 'weigth'"),
        ("data: {val_sources: {real: {taks: [x]}}}", "data.val_sources.real of kind image_text has no option 'taks'"),
        ("data: {sources: {g: {weigth: 1, sources: {}}}}", "g.weigth"),
        ("trainer: {strategy: {_target_: sphinx_pl.distributed.zero.Zero3, frozn: x}}", "trainer.strategy.frozen"),
        ("trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, dirpth: x}}", "profiler.dirpath"),
        ("callbacks: {mine: {_target_: no.such.Class}}", "callbacks.mine._target_=no.such.Class cannot be imported"),
        ("own: {used: 1, unused: 2}\nname: run${own.used}", "there is no key own.unused: did you mean own.used?"),
        ("data: {packing: null}", "data.packing is missing"),
    ],
)
def test_other_refusals(changes: str, words: str) -> None:
    assert words in refusal("train", changes)


@pytest.mark.parametrize(
    ("script", "changes", "wrong", "right"),
    [
        ("evaluate", "batchsize: 3", "batchsize", "batch_size"),
        ("evaluate", "data: {pakcing: {}}", "data.pakcing", "data.packing"),
        ("evaluate", "benchmark: {mme: {scr: x}}", "benchmark.mme.scr", "benchmark.mme.src"),
        ("mix_weights", "betta: 0.5", "betta", "beta"),
        ("mix_weights", "data: {batch_size: 4}", "data.batch_size", "data.packing.micro_batch_rows"),
    ],
)
def test_other_scripts_refuse_unknown_keys(script: str, changes: str, wrong: str, right: str) -> None:
    assert refusal(script, changes) == f"there is no key {wrong}: did you mean {right}?"


def test_keys_of_ones_own_are_read_by_interpolations() -> None:
    cfg = composed("train", "+folders.a=x", "+part=a", "+data.images=y")
    with open_dict(cfg):
        cfg.data.root, cfg.data.tokenizer = "${folders.${part}}", "${.images}/tokenizer.model"
    check_train(cfg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("seed: null", "seed=null must be a whole number of at least 0"),
        ("seed: -1", "seed=-1 must be"),
        ("seed: 4294967296", "seed=4294967296 must be"),
        ("seed: abc", "seed=abc must be a whole number"),
        ("seed: 1.5", "seed=1.5 must be"),
        ("overwrite: [true]", "overwrite=[True] must be true or false"),
        ("trainer: {log_every_n_steps: 0}", "trainer.log_every_n_steps=0 must be a whole number of at least 1"),
        ("stage: {max_steps: ten}", "stage.max_steps=ten must be a whole number of at least 1"),
        ("stage: {max_steps: -1}", "stage.max_steps=-1 must be"),
        ("stage: {max_steps: [1, 2]}", "stage.max_steps"),
        ("stage: {max_steps: null}", "stage.max_steps=null must be"),
        ("stage: {clip: .nan}", "stage.clip=nan must be"),
        ("stage: {val_every: -2}", "stage.val_every=-2 must be"),
        ("stage: {accumulate: 0}", "stage.accumulate=0 must be"),
        ("stage: {train_parts: decoder}", "stage.train_parts: it takes a list"),
        ("stage: {optim: {betas: [0.9]}}", "stage.optim.betas=[0.9] must be a list of 2 numbers"),
        ("stage: {optim: {betas: [0.9, 1.0]}}", "each at least 0 and below 1"),
        ("stage: {optim: {warmup: -1}}", "stage.optim.warmup=-1.0 must be a number of at least 0"),
        ("stage: {optim: {lr: .inf}}", "stage.optim.lr=inf must be a number above 0"),
        (
            "stage: {optim: {weight_decay: 11}}",
            "stage.optim.weight_decay=11.0 must be a number of at least 0 and at most 10",
        ),
        ("stage: {optim: {lr_scale: {clip: .nan}}}", "stage.optim.lr_scale={'clip': nan"),
        ("stage: {optim: {min_lr: 1}}", "min_lr=1.0 must be between 0 and lr"),
        ("data: {packing: {micro_batch_rows: 0}}", "data.packing.micro_batch_rows=0 must be"),
        ("data: {packing: {micro_batch_rows: 1000000000000}}", "data.packing.micro_batch_rows=1000000000000 must be"),
        ("data: {packing: {look_ahead: -1}}", "data.packing.look_ahead=-1.0 must be"),
        ("data: {processor: {max_length: 0}}", "data.processor.max_length=0 must be"),
        ("data: {workers: -1}", "data.workers=-1 must be"),
        ("data: {val_samples: 0}", "data.val_samples=0 must be"),
        ("data: {max_skipped: 2}", "data.max_skipped=2.0 must be"),
        ("data: {sources: {real: {weight: -1}}}", "data.sources.real.weight=-1.0 must be"),
        ("data: {sources: {real: {epochs: 0}}}", "data.sources.real.epochs=0 must be"),
        ("data: {mixing: {partitions: 0}}", "data.mixing.partitions=0 must be a whole number of at least 1"),
        ("data: {augment: {flip: 2}}", "data.augment.flip=2.0 must be"),
    ],
)
def test_values_out_of_bounds_are_one_line(changes: str, words: str) -> None:
    assert words in refusal("train", changes)


def test_every_argument_of_lightnings_trainer_works_or_names_what_works() -> None:
    arguments = set(inspect.signature(L.Trainer).parameters)
    assert arguments == TRAINER_WORKS | set(TRAINER_OURS)
    assert not TRAINER_WORKS & set(TRAINER_OURS)


@pytest.mark.parametrize("key", sorted(TRAINER_OURS)[::6])
def test_arguments_of_the_trainer_without_an_effect_are_refused(key: str) -> None:
    line = refusal("train", f"trainer: {{{key}: 7}}")
    assert line.startswith(f"trainer.{key}=7 has no effect here: ")


def test_overfit_batches_names_the_preset() -> None:
    assert "debug=overfit" in refusal("train", "trainer: {overfit_batches: 1}")


def test_the_keys_of_a_stage_are_those_of_its_class() -> None:
    assert stage_keys("sphinx_pl.stages.Stage") == {*StageConfig.__dataclass_fields__, "_target_"}


@pytest.mark.parametrize(
    ("script", "override", "words"),
    [
        ("train", "lr=1e-4", "there is no key lr: did you mean stage.optim.lr?"),
        ("train", "stage.optim.learning_rate=1e-4", "did you mean stage.optim.lr?"),
        ("train", "data.sources.reel.weight=2", "did you mean data.sources.real.weight?"),
        ("train", "stge.max_steps=3", "did you mean stage.max_steps?"),
        ("train", "trainer.max_time=00:00:01:00", "write +trainer.max_time=00:00:01:00"),
        ("train", "trainer.overfit_batches=1", "use debug=overfit"),
        ("train", "experment=demo", "there is no key experment: did you mean experiment?"),
        ("train", "data/mixtur=own", "did you mean data/mixture?"),
        ("evaluate", "limt=3", "there is no key limt: did you mean limit?"),
        ("evaluate", "generation.temprature=1", "did you mean generation.temperature?"),
        ("evaluate", "reweighting.strenght=1", "did you mean reweighting.strength?"),
        ("evaluate", "lean.strength=1", "did you mean reweighting.strength?"),  # its earlier name
        ("mix_weights", "criterion=score", "did you mean objective?"),  # likewise
        ("mix_weights", "options.densty=1", "options.densty: method=linear has no such option"),
        ("mix_weights", "data.packing.row_lenght=5", "did you mean data.packing.row_length?"),
    ],
)
def test_an_override_of_no_key_names_the_nearest(script: str, override: str, words: str) -> None:
    with pytest.raises(Exception, match="Could not override") as raised:
        composed(script, override)
    error = explain_override(raised.value, CONFIG_FOLDER, script, [override], CHECKS[script])
    assert error is not None
    assert words in str(error)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("stage=finetun", "stage=finetun: there is no file stage/finetun.yaml; did you mean 'finetune'? known:"),
        ("callbacks=[default,predction]", "did you mean 'predictions'?"),
        ("stage=null", "stage=null: stage takes the name of a file in conf/stage (finetune, one_stage,"),
        ("data=5", "a single key of it is set with data.KEY=VALUE"),
    ],
)
def test_a_choice_without_a_file_names_the_files(choice: str, words: str) -> None:
    with pytest.raises((UserError, HydraException)) as refused:
        composed("train", choice)
    assert words in one_line(refused.value)
    assert "searchpath" not in one_line(refused.value)


def test_an_interpolation_of_a_whole_section_reads_none_of_its_keys() -> None:
    wrong = "benchmark: {pope_random: {kind: pope, src: x, splitt: y}}\nlogger: {csv: {save_dir: '${benchmark}'}}"
    assert "benchmark.pope_random.splitt: did you mean benchmark.pope_random.split" in refusal("train", wrong)
    assert "data.batch_size" in refusal("train", "data: {batch_size: 4}\nlogger: {csv: {save_dir: '${data}'}}")


def test_a_required_key_that_is_missing_is_named_once() -> None:
    cfg = TRAIN.copy()
    with open_dict(cfg):
        del cfg.stage["max_steps"]
    with pytest.raises(UserError, match=r"^stage\.max_steps is missing$"):
        check_train(cfg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("callbacks: {checkpoint: {keep: abc}}", "callbacks.checkpoint.keep=abc must be one of: a whole number"),
        ("callbacks: {checkpoint: {keep: null}}", "callbacks.checkpoint.keep=null must be one of: a whole number"),
        ("callbacks: {export: {keep: 1.5}}", "callbacks.export.keep=1.5 must be one of: a whole number"),
        ("callbacks: {preemption: {requeue: 1}}", "callbacks.preemption.requeue=1 must be one of: true or false"),
        ("trainer: {deterministic: foo}", "trainer.deterministic=foo must be one of: true or false, warn, null"),
        ("trainer: {detect_anomaly: foo}", "trainer.detect_anomaly=foo must be one of: true or false"),
        ("trainer: {limit_val_batches: abc}", "trainer.limit_val_batches=abc must be one of: a whole number, a number"),
        ("trainer: {precision: foo}", "trainer.precision=foo must be one of: "),
    ],
)
def test_instances_get_values_of_their_types(changes: str, words: str) -> None:
    assert words in refusal("train", changes)


def test_an_omitted_key_has_its_default() -> None:
    cfg = composed("train", "~metric", "~overwrite", "trainer=cpu")
    check_train(cfg)
    assert (cfg.metric, cfg.overwrite) == ("val/loss", False)


def test_the_keys_of_a_section_are_named_without_it() -> None:
    message = refusal("train", "model: {decoder: {zzz: 1}}")
    assert "there is no key model.decoder.zzz; known in model.decoder: balance_weight, experts," in message
    assert len(message) < 300
    assert refusal("train", "trainer: {zzz: 1}").endswith(", ...")


def test_data_commands_and_pipelines_refuse_as_well() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size: did you mean data\.packing\.micro_batch_rows"):
        composed_for_data(["+data.batch_size=4"])
    with pytest.raises(UserError, match=r"did you mean stage\.optim\.lr"):
        composed_for_data(["lr=1"])
    with pytest.raises(UserError, match="there is no key redoo: did you mean redo"):
        compose_pipeline(["+redoo=all"])
    with pytest.raises(UserError, match=r"launcher\.partion: did you mean launcher\.partition"):
        compose_pipeline(["launcher=slurm", "+launcher.partion=x"])


def test_nothing_near_is_no_suggestion() -> None:
    assert nearest_key("zzz", ["stage.optim.lr", "seed"]) is None


@pytest.mark.parametrize(
    ("group", "package", "header"),
    [
        ("data/mixture", "data", ""),
        ("data/mixture", "data", "# @package dta\n"),
        ("data/mixture", "data", "# @package _global_\n"),
        ("experiment", "_global_", "# My own.\n"),
        ("debug", "_global_", ""),
    ],
)
def test_a_file_without_its_package_line_is_refused(tmp_path: Path, group: str, package: str, header: str) -> None:
    file = tmp_path / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    hydra = OmegaConf.create(
        {"runtime": {"choices": {group: "mine"}, "config_sources": [{"path": str(tmp_path), "schema": "file"}]}}
    )
    file.write_text(f"{header}sources: {{}}\n")
    with pytest.raises(UserError, match=f"its first line must be '# @package {package}'"):
        check_packages(hydra)
    file.write_text(f"# @package {package}\nsources: {{}}\n")
    check_packages(hydra)
