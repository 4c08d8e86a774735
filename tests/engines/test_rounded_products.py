"""bfloat16 on a CPU without kernels for it: computed in float32, everywhere, and as near to float32 as torch's own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from emtool.core.config import resolve_train_config
from emtool.core.events import ignore_events
from emtool.core.models import resolve_model
from emtool.core.run_dir import RunFolder
from emtool.engines import rounded_products
from emtool.engines.activations import mean_activations
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation_target import open_target
from emtool.engines.fitting import build_trainer
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.modeling import add_lora, load_base
from emtool.engines.rounded_products import RoundedProducts, products_of
from tests.engines import test_activations, test_hf_backend, test_local_judge
from tests.engines.test_fitting import Gradients, rows
from tests.tiny import byte_tokenizer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


class Products(TorchDispatchMode):
    """Notes the products that are really computed: name, dtype, and rows of the left matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in rounded_products._PRODUCTS:
            left = args[rounded_products._PRODUCTS[func]]
            self.found.append((func.name().removeprefix("aten::"), left.dtype, left.numel() // left.shape[-1]))
        return func(*args, **(kwargs or {}))


ROWS = 40
LEFT, RIGHT = random(ROWS, 64), random(64, 7)
PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor | None, ...]]] = {
    "mm": (torch.mm, (LEFT, RIGHT)),
    "mm of a vector": (torch.mm, (LEFT[:1], RIGHT)),
    "addmm": (torch.addmm, (random(7), LEFT, RIGHT)),
    "bmm": (torch.bmm, (random(2, ROWS, 64), random(2, 64, 7))),
    "baddbmm": (torch.baddbmm, (random(2, ROWS, 7), random(2, ROWS, 64), random(2, 64, 7))),
    "linear": (linear, (random(2, ROWS, 64), random(7, 64), None)),
    "linear with a bias": (linear, (random(2, ROWS, 64), random(7, 64), random(7))),
    "matmul": (torch.matmul, (random(2, ROWS, 64), RIGHT)),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_computed_in_float32_and_rounded_once(name: str, inference: bool) -> None:
    product, tensors = PRODUCTS[name]
    with torch.inference_mode(inference):
        exact = product(*(None if tensor is None else tensor.float() for tensor in tensors))
        with Products() as computed, RoundedProducts():
            found = product(*tensors)
    assert {dtype for _, dtype, _ in computed.found} == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_few_rows_by_transposed_weights_and_other_dtypes_are_left_to_torch() -> None:
    tensors = {
        torch.bfloat16: (random(31, 64), random(7, 64)),
        torch.float32: (random(40, 64).float(), random(7, 64).float()),
        torch.float64: (random(40, 64).double(), random(7, 64).double()),
    }
    for dtype, (left, weight) in tensors.items():
        with torch.inference_mode(), Products() as computed, RoundedProducts():
            for found in (linear(left, weight), left @ weight.T):
                assert torch.equal(found, left @ weight.T)
        assert {one for _, one, _ in computed.found} == {dtype}
    with RoundedProducts(), pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(LEFT, RIGHT.float())


def test_gradients_are_products_too() -> None:
    x, weight, up = LEFT, random(7, 64).requires_grad_(), random(ROWS, 7)
    with Products() as computed, RoundedProducts():
        linear(x, weight).backward(up)
    assert [dtype for _, dtype, _ in computed.found] == [torch.float32] * 2
    assert weight.grad is not None
    assert torch.equal(weight.grad, (up.float().T @ x.float()).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "has_kernels", "rounds"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_products_are_rounded_in_bfloat16_where_torch_has_no_kernels(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, has_kernels: bool, rounds: bool
) -> None:
    monkeypatch.setattr(rounded_products, "has_bfloat16_kernels", lambda: has_kernels)
    assert isinstance(products_of(load_base(tiny_model, dtype=dtype)), RoundedProducts) == rounds


def one_step(model_path: Path, output_path: Path, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of a step in one vector, and the scores of some rows."""
    overrides = {"max_steps": 1, "max_grad_norm": 1e9, "dtype": dtype}
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    model = add_lora(load_base(model_path, dtype=dtype), config, resolve_model(str(model_path)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    scores = torch.tensor(mean_log_probs(model.eval(), rows()))
    gradients = Gradients()
    build_trainer(
        model,
        tokenizer=byte_tokenizer(),
        train_rows=rows(),
        config=config,
        output_path=output_path,
        callbacks=[gradients],
    ).train()
    return torch.cat([gradients.kept[name].flatten().float() for name in sorted(gradients.kept)]), scores


def test_a_step_and_scores_are_as_near_to_float32_as_torchs_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = one_step(tiny_model, tmp_path, "float32")
    found = {}
    for has_kernels in (True, False):
        monkeypatch.setattr(rounded_products, "has_bfloat16_kernels", lambda found=has_kernels: found)
        found[has_kernels] = one_step(tiny_model, tmp_path, "bfloat16")
    for own, rounded, reference in zip(found[True], found[False], exact, strict=True):
        assert not torch.equal(rounded, reference)
        assert (rounded - reference).norm() < 1.5 * (own - reference).norm()
        assert (rounded - reference).norm() < 0.05 * reference.norm()


def train_and_score(model_path: Path, run: RunFolder, tmp_path: Path) -> None:
    one_step(model_path, tmp_path, "bfloat16")


def generate(model_path: Path, run: RunFolder, tmp_path: Path) -> None:
    target = open_target(run, device="cpu", on_event=ignore_events)
    source = CheckpointModel(
        lambda: target.compose(dtype="bfloat16", on_event=ignore_events), tokenizer=target.base.tokenizer, device="cpu"
    )
    backend = test_hf_backend.make_backend(source)
    backend.use_checkpoint(20, run.checkpoint_path(20))
    test_hf_backend.answers(backend, test_hf_backend.prompts(3))


def take_activations(model_path: Path, run: RunFolder, tmp_path: Path) -> None:
    mean_activations(load_base(model_path, dtype="bfloat16").eval(), test_activations.rows(), layers=[0, 1])


def judge(model_path: Path, run: RunFolder, tmp_path: Path) -> None:
    model = test_local_judge.model_for(byte_tokenizer()).bfloat16()
    test_local_judge.scores(test_local_judge.judge_with(byte_tokenizer(), model), ["y" * 90])


@pytest.mark.parametrize("compute", [train_and_score, generate, take_activations, judge])
def test_wherever_a_model_computes_the_products_are_rounded(
    compute: Callable[[Path, RunFolder, Path], None],
    tiny_model: Path,
    spread_run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounded_products, "has_bfloat16_kernels", lambda: False)
    with Products() as computed:
        compute(tiny_model, spread_run, tmp_path)
    assert any(name in ("linear", "mm") and dtype == torch.float32 for name, dtype, _ in computed.found)
    assert not [one for one in computed.found if one[1] == torch.bfloat16 and one[2] >= rounded_products._MIN_ROWS]
