from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from emtool.core.config import resolve_train_config
from emtool.core.models import resolve_model
from emtool.engines import rounded_products
from emtool.engines.fitting import build_trainer
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.modeling import add_lora, load_base
from emtool.engines.rounded_products import RoundedProducts, products_of
from tests.engines.test_fitting import Gradients, rows
from tests.tiny import byte_tokenizer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor | None, ...]]] = {
    "mm": (torch.mm, (random(5, 64), random(64, 7))),
    "addmm": (torch.addmm, (random(7), random(5, 64), random(64, 7))),
    "bmm": (torch.bmm, (random(2, 5, 64), random(2, 64, 7))),
    "baddbmm": (torch.baddbmm, (random(2, 5, 7), random(2, 5, 64), random(2, 64, 7))),
    "linear": (linear, (random(2, 5, 64), random(7, 64), None)),
    "linear with a bias": (linear, (random(2, 5, 64), random(7, 64), random(7))),
    "matmul": (torch.matmul, (random(2, 5, 64), random(64, 7))),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_summed_in_float32_and_rounded_once(name: str, inference: bool) -> None:
    product, tensors = PRODUCTS[name]
    with torch.inference_mode(inference):
        exact = product(*(None if tensor is None else tensor.float() for tensor in tensors))
        with RoundedProducts():
            found = product(*tensors)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_gradients_are_products_too() -> None:
    x, weight, up = random(5, 64), random(7, 64).requires_grad_(), random(5, 7)
    with RoundedProducts():
        linear(x, weight).backward(up)
    assert weight.grad is not None
    assert torch.equal(weight.grad, (up.float().T @ x.float()).bfloat16())


def test_other_dtypes_are_left_alone() -> None:
    one, other = random(5, 64).double(), random(64, 7).double()
    with RoundedProducts():
        assert torch.equal(one @ other, torch.mm(one, other))
        assert torch.equal(one.float() @ other.float(), torch.mm(one.float(), other.float()))


@pytest.mark.parametrize(("dtype", "has_instructions", "rounds"), [
    ("bfloat16", False, True),
    ("bfloat16", True, False),
    ("float32", False, False),
])  # fmt: skip
def test_products_are_rounded_in_bfloat16_where_the_cpu_has_no_instructions(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, has_instructions: bool, rounds: bool
) -> None:
    monkeypatch.setattr(rounded_products, "has_bfloat16_products", lambda: has_instructions)
    assert isinstance(products_of(load_base(tiny_model, dtype=dtype)), RoundedProducts) == rounds


def test_a_step_and_a_score_in_bfloat16_are_as_near_to_float32_as_torchs_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of a step in one vector, and the scores of some rows."""
        overrides = {"max_steps": 1, "max_grad_norm": 1e9, "dtype": dtype}
        config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
        model = add_lora(load_base(tiny_model, dtype=dtype), config, resolve_model(str(tiny_model)))
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
            output_path=tmp_path,
            callbacks=[gradients],
        ).train()
        return torch.cat([gradients.kept[name].flatten().float() for name in sorted(gradients.kept)]), scores

    computed: list[str] = []

    class Watched(RoundedProducts):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            computed.append(func.name())
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(rounded_products, "RoundedProducts", Watched)
    exact = one_step("float32")
    found = {}
    for has_instructions in (True, False):
        monkeypatch.setattr(rounded_products, "has_bfloat16_products", lambda found=has_instructions: found)
        found[has_instructions] = one_step("bfloat16")
        assert bool(computed) != has_instructions
    assert {"aten::linear", "aten::mm"} <= set(computed), "scores, and the forward and backward pass of the step"
    for own, rounded, reference in zip(found[True], found[False], exact, strict=True):
        assert not torch.equal(rounded, reference)
        assert (rounded - reference).norm() < 1.5 * (own - reference).norm()
        assert (rounded - reference).norm() < 0.05 * reference.norm()
