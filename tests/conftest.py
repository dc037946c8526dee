"""Fixtures for all tests: tiny configurations of the real model, and a small sample world made
once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.runtime import signals

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent


def tiny_model(**overrides: Any) -> SphinxConfig:
    """Return a model with all four encoders that is smaller than the sample model, so a step takes
    milliseconds.

    It has 512 pieces and images of 32 pixels.
    """
    vit = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2}
    return SphinxConfig.from_dict(
        {
            "name": "tiny",
            "decoder": {"vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 96}
            | {"qk_norm": True, "tie_embeddings": True, "max_positions": 512},
            "vision": {
                "image_size": 32,
                "encoders": {
                    "clip": vit,
                    "convnext": {"image_size": 32, "stem": 4, "depths": [1, 1], "dims": [16, 32]},
                    "dinov2": vit,
                    "qformer": {"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_layers": 1}
                    | {"vision_heads": 2, "vision_ffn_width": 64, "queries": 2, "width": 32, "layers": 2, "heads": 2}
                    | {"ffn_width": 64},
                },
                "merge": "shuffle",
                "merge_factor": 2,
            },
        }
        | overrides
    )


LONGEST = ("test_train", "test_engines", "test_zero3", "test_plan", "test_preemption", "test_evaluate", "test_export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that at the end no process has one left while the others wait."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sample world at a fiftieth of its size, in the formats of the real one."""
    from sphinx_pl.data.sample_world.writer import build

    folder = tmp_path_factory.mktemp("data") / "sample"
    build(folder, seed=0, scale=0.02)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies and indices go to a folder of this test run."""
    os.environ["SPHINX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_composed_configuration() -> Iterator[None]:
    """Forget the configuration that a test composed, so that a script in a later test does not find
    it.
    """
    yield
    if hydra := sys.modules.get("hydra.core.hydra_config"):
        hydra.HydraConfig.instance().cfg = None


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    """Restore the signal handlers after a test, and forget noted signals."""
    handlers = {number: signal.getsignal(number) for number in (*signals.SIGNALS, signals.INTERRUPT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals.forget()


@pytest.fixture
def model_config() -> SphinxConfig:
    return tiny_model()


def new_processor(sample_data: Path, model_config: SphinxConfig) -> Processor:
    assert model_config.vision is not None
    config = ProcessorConfig(system="", decimals=2, max_length=256)
    return Processor(
        config,
        load_tokenizer(sample_data / "tokenizer.model"),
        tokens_per_image=model_config.tokens_per_image,
        image_size=model_config.vision.image_size,
    )


@pytest.fixture
def processor(sample_data: Path, model_config: SphinxConfig) -> Processor:
    return new_processor(sample_data, model_config)


def transformers_decoder(config: DecoderConfig) -> Any:
    """Return transformers' LLaMA or, with experts, Mixtral of these sizes with new weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn_width,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if config.experts:
        sparse = {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
        return MixtralForCausalLM(MixtralConfig(**sizes, **sparse, sliding_window=None)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.fixture
def models(tmp_path: Path, model_config: SphinxConfig, processor: Processor) -> Callable[..., list[Path]]:
    """Return a function that writes tiny models `model_0`, ... with different weights."""
    from sphinx_pl.checkpoints.native import write_checkpoint
    from sphinx_pl.models.sphinx import Sphinx

    def write(
        count: int,
        dtype: torch.dtype = torch.float32,
        frozen: str | None = None,
        values: dict[str, tuple[float, ...]] | None = None,
        **options: Any,
    ) -> list[Path]:
        """
        Args:
            frozen: beginning of the names of tensors that are the same in all.
            values: name -> what all its elements are, in each model.
        """
        paths = []
        first: dict[str, torch.Tensor] = {}
        for number in range(count):
            torch.manual_seed(number)
            tensors = {name: tensor.to(dtype) for name, tensor in Sphinx(model_config).state_dict().items()}
            tensors |= {name: torch.full_like(tensors[name], value[number]) for name, value in (values or {}).items()}
            # A new norm consists of ones.
            tensors = {
                name: tensor + 0.01 * (number + 1) if tensor.dim() == 1 and name not in (values or {}) else tensor
                for name, tensor in tensors.items()
            }
            first = first or tensors
            if frozen is not None:
                tensors |= {name: tensor for name, tensor in first.items() if name.startswith(frozen)}
            paths.append(
                write_checkpoint(
                    tmp_path / f"model_{number}",
                    tensors,
                    model_config.to_dict(),
                    processor.to_dict(),
                    processor.tokenizer.path,
                    {"stage": f"stage_{number}"},
                    **options,
                )
            )
        return paths

    return write


# --- installations


def tracked() -> list[str]:
    """The repository's files and links as git knows them, so that nothing else that lies about gets in."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = done.stdout.split("\0")
    return [name for name in names if name and ((REPOSITORY / name).is_file() or (REPOSITORY / name).is_symlink())]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes of the tracked files; the source distribution lies beside it."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new environment that holds the wheel, lmms-eval and Hugging Face's `evaluate`.

    pip installs them; what they need is taken from this environment if it is there.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [str(wheel), "lmms_eval==0.7.3", "evaluate"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted], check=True)
    return str(python)
