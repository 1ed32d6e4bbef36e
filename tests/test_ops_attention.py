from __future__ import annotations

import pytest
import torch

from llava_core.ops import BACKENDS, attention
from llava_core.runtime import ConfigError

SHAPES = [(1, 2, 2, 7, 8), (2, 4, 2, 13, 16), (1, 6, 1, 5, 32)]


def _inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    b, heads, kv, t, d = shape
    q, k, v = (torch.randn(b, h, t, d, dtype=dtype, requires_grad=True) for h in (heads, kv, kv))
    segments = torch.tensor([[0] * 3 + [1] * (t - 3)] * b)
    return q, k, v, segments


def _run(name, shape, dtype=torch.float32, packed=True):
    q, k, v, segments = _inputs(shape, dtype)
    out = attention(q, k, v, segments=segments if packed else None, backend=name)
    out.float().square().sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in (q, k, v))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["sdpa", "per_segment", "auto"])
def test_backends_equal_the_reference(name, shape, packed) -> None:
    for got, expected in zip(_run(name, shape, packed=packed), _run("reference", shape, packed=packed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "per_segment"])
def test_low_precision_errs_at_most_by_the_ratio_rule(name) -> None:
    exact = _run("reference", SHAPES[1])
    plain = _run("reference", SHAPES[1], torch.bfloat16)
    ours = _run(name, SHAPES[1], torch.bfloat16)
    for k, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert (o - e).abs().max() <= (2 if k == 0 else 3) * (p - e).abs().max() + 1e-6


def test_a_wrong_segment_is_seen() -> None:
    q, k, v, segments = _inputs(SHAPES[1])
    wrong = segments.clone()
    wrong[:, 3] = 0
    right = attention(q, k, v, segments=segments, backend="reference")
    assert not torch.allclose(attention(q, k, v, segments=wrong, backend="per_segment"), right, atol=1e-4)


def test_a_packed_row_equals_its_samples() -> None:
    q, k, v, segments = _inputs(SHAPES[1])
    packed = attention(q, k, v, segments=segments)
    alone = [attention(q[:, :, s], k[:, :, s], v[:, :, s]) for s in (slice(0, 3), slice(3, None))]
    torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_unknown_backend_names_the_known() -> None:
    q, k, v, _ = _inputs(SHAPES[0])
    with pytest.raises(ConfigError, match="sdpa"):
        attention(q, k, v, backend="spda")
    assert BACKENDS.get("sdpa").name == "sdpa"
