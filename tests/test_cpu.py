"""cpu.py: its kernels against PyTorch's in float64, and a model with and without them. Run: pytest tests/test_cpu.py"""
import copy

import pytest
import torch
import torch.nn as nn

import cpu
from small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [(5, 3, 4), (1, 1, 1), (200, 40, 90)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal_to_rounding(found, exact):
    assert found.shape == exact.shape
    assert (found - exact).norm() <= 1e-6 * exact.norm()


def plain_mm(a, b):
    return torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1]))


def plain_addmm_(total, a, b, beta=1):
    return torch.addmm(total, a, b, beta=beta, out=total)


@pytest.fixture(params=["onednn", "pytorch"])
def products(request):
    """(a @ b, total += a @ b) by oneDNN, and by PyTorch."""
    return (cpu._mm, cpu._addmm_) if request.param == "onednn" else (plain_mm, plain_addmm_)


@pytest.mark.parametrize("n, k, m", [(1, 7, 5), (33, 64, 20), (33, 20, 64), (500, 96, 300)])
def test_products_equal_those_in_float64(n, k, m, products):
    mm, addmm_ = products
    a, b, c = normal(n, k), normal(m, k, seed=1), normal(n, m, seed=2)
    wide = [x.double() for x in (a, b, c)]
    assert_equal_to_rounding(mm(a, b.T), wide[0] @ wide[1].T)
    assert_equal_to_rounding(mm(a, b.T.contiguous()), wide[0] @ wide[1].T)
    strided = normal(m, 2 * k, seed=1)[:, ::2]      # neither it nor its transpose is contiguous
    assert_equal_to_rounding(mm(a, strided.T), wide[0] @ strided.double().T)
    assert_equal_to_rounding(mm(a.T, c), wide[0].T @ wide[2])
    for x, y in ((a, c), (c, a)):
        total = normal(x.shape[1], y.shape[1])
        exact = total.double() + x.double().T @ y.double()
        assert addmm_(total, x.T, y) is total
        assert_equal_to_rounding(total, exact)
        total.fill_(torch.nan)                      # with beta=0 it is not read
        assert addmm_(total, x.T, y, beta=0) is total
        assert_equal_to_rounding(total, x.double().T @ y.double())


def test_other_products_are_pytorchs():
    cpu.multiply_by_onednn()
    a, b = normal(6, 5, dtype=torch.float64), normal(5, 4, dtype=torch.float64)
    assert torch.equal(a @ b, torch.mm(a, b, out=torch.empty(6, 4, dtype=torch.float64)))
    assert (a.bfloat16() @ b.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(normal(3, 0) @ normal(0, 2), torch.zeros(3, 2)) and (normal(0, 3) @ normal(3, 2)).shape == (0, 2)
    total = torch.ones(6, 4)
    exact = 0.5 * total.double() + 2 * (a @ b)
    assert_equal_to_rounding(total.addmm_(a.float(), b.float(), beta=0.5, alpha=2), exact)
    with pytest.raises(RuntimeError, match="cannot be multiplied|same dtype"):
        a.float() @ normal(6, 5)
    with pytest.raises(RuntimeError, match="dtype"):
        a.float() @ b


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_float64_in_value_and_gradients(bias):
    cpu.multiply_by_onednn()
    ours, plain = nn.Linear(20, 64, bias=bias), nn.Linear(20, 64, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    x, grad = normal(33, 20).requires_grad_(), normal(33, 64, seed=1)
    wide = x.detach().double().requires_grad_()
    y, expected = ours(x), plain(wide)
    assert_equal_to_rounding(y, expected)
    y.backward(grad)
    expected.backward(grad.double())
    assert_equal_to_rounding(x.grad, wide.grad)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert_equal_to_rounding(p.grad, q.grad)


def test_the_gradient_of_an_embedding_is_added_up_over_tokens_and_rows():
    ours, plain = cpu.Embedding(11, 4), nn.Embedding(11, 4)
    plain.load_state_dict(ours.state_dict())
    for i, tokens in enumerate((torch.tensor([3, 5, 3, 3]), torch.tensor([5, 9]))):
        for embedding in (ours, plain):
            x = embedding(tokens)
            assert torch.equal(x, ours.weight[tokens])
            x.backward(normal(len(tokens), 4, seed=i))
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert not torch.equal(ours.weight.grad[9], torch.zeros(4))


@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 16)])
def test_rms_norm_equals_pytorchs_in_value_and_gradients(shape):
    ours, plain = cpu.RMSNorm(16, 1e-5).double(), nn.RMSNorm(16, 1e-5).double()
    for norm in (ours, plain):
        norm.weight.data = normal(16, seed=1, dtype=torch.float64)
    results = []
    for norm in (ours, plain):
        x = normal(*shape, dtype=torch.float64).requires_grad_()
        y = norm(x)
        y.backward(normal(*shape, seed=2, dtype=torch.float64))
        results.append((y, x.grad, norm.weight.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2"},
                                     {"model_type": "qwen3", "head_dim": 8},
                                     {"model_type": "mistral", "sliding_window": 17}], ids=str)
def test_a_model_is_the_same_with_and_without(changes, tmp_path):
    plain = small_model(tmp_path, **changes)
    fast = copy.deepcopy(plain)
    cpu.speed_up(fast)
    assert type(fast.model.norm) is cpu.RMSNorm and type(fast.model.embed_tokens) is cpu.Embedding
    tokens = torch.arange(sum(map(sum, PAIRS))) ** 2 % 60
    for model in (plain, fast):
        for row in range(2):                    # gradients add up
            (model.response_logps(tokens, PAIRS) * (row + 1)).sum().backward()
    logps, expected = (model.response_logps(tokens, PAIRS) for model in (fast, plain))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast(tokens), plain(tokens), rtol=0, atol=1e-10)
    mine, theirs = dict(fast.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, p in mine.items():
        expected = theirs[name]
        assert torch.equal(p, expected)
        assert (p.grad - expected.grad).norm() <= 1e-10 * expected.grad.norm(), name
