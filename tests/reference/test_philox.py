import math

import pytest
import torch

from l0kernels.reference import philox4x32, uniform

MASK = 0xFFFFFFFF


def philox_of_ints(counter, key):
    """Philox4x32-10 on Python integers, written from the paper's round function."""
    x = list(counter)
    k = list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(high >> 32) ^ x[1] ^ k[0], high & MASK, (low >> 32) ^ x[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


# The known answers of the Random123 distribution for philox4x32, 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()) == expected
    assert tuple(philox_of_ints(counter, key)) == expected


def test_against_python_integers():
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 257), generator=generator)
    key = torch.randint(0, 2**32, (2, 257), generator=generator)
    expected = [philox_of_ints(c, k) for c, k in zip(counter.T.tolist(), key.T.tolist(), strict=True)]
    assert philox4x32(counter, key).T.tolist() == expected
    assert philox4x32(counter, key[:, :1])[:, 0].tolist() == expected[0]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 0x123456789ABCDEF0, 2**63 - 2, -1, -(2**63)])
@pytest.mark.parametrize(("stream", "rank"), [(0, 0), (3, 0), (0, 5), (2**32 - 1, 2**32 - 1)])
def test_uniform_uses_every_word(seed, stream, rank):
    index = torch.tensor([0, 1, 12345, 2**32 - 1, 2**32, 2**32 + 1, 2**62 + 7])
    u = uniform(torch.tensor([seed]), index, stream=stream, rank=rank)
    key = (seed & MASK, (seed >> 32) & MASK)
    expected = []
    for i in index.tolist():
        r = philox_of_ints((i & MASK, i >> 32, stream, rank), key)[0]
        expected.append(((r >> 9) + 0.5) * 2.0**-23)
    assert u.dtype == torch.float32
    assert u.tolist() == expected  # exact: 24 bits fit in float32


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-24), (MASK, 1 - 2.0**-24), (511, 2.0**-24)])
def test_uniform_ends(monkeypatch, word, expected):
    monkeypatch.setitem(uniform.__globals__, "philox4x32", lambda counter, key: counter.fill_(word))
    u = uniform(torch.tensor([0]), torch.arange(3))
    assert u.tolist() == [expected] * 3
    assert (1 - u).tolist() == [1 - expected] * 3


def test_uniform_is_inside_and_complement_is_exact():
    u = uniform(torch.tensor([42]), torch.arange(100_000))
    assert (u > 0).all()
    assert (u < 1).all()
    assert ((1 - u).double() == 1 - u.double()).all()


def test_uniform_shape_follows_index():
    flat = uniform(torch.tensor([9]), torch.arange(24))
    assert torch.equal(uniform(torch.tensor([9]), torch.arange(24).reshape(2, 3, 4)), flat.reshape(2, 3, 4))
    assert uniform(torch.tensor([9]), torch.arange(0)).shape == (0,)
    assert uniform(torch.tensor([9]), torch.tensor(3)) == flat[3]


def test_uniform_takes_a_stream_per_index():
    index = torch.tensor([4, 4, 7])
    u = uniform(torch.tensor([9]), index, stream=torch.tensor([0, 2, 1]))
    expected = [uniform(torch.tensor([9]), i, stream=s) for i, s in zip(index, (0, 2, 1), strict=True)]
    assert torch.equal(u, torch.stack(expected))


def test_uniform_distribution_and_independence():
    n = 100_000
    index = torch.arange(n)
    streams = torch.stack(
        [
            uniform(torch.tensor([1]), index),
            uniform(torch.tensor([2]), index),
            uniform(torch.tensor([1]), index, stream=1),
            uniform(torch.tensor([1]), index, rank=1),
            uniform(torch.tensor([1]), index + n),
        ]
    ).double()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 1e-3 (the seeds are fixed).
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (streams.sort(1).values - grid).abs().max() < 1.95 / math.sqrt(n)
    correlation = torch.corrcoef(streams) - torch.eye(5)
    assert correlation.abs().max() < 4.5 / math.sqrt(n)
