"""Stop tokens masked and given back as stock does it, and nothing waited for."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ext.patches.min_tokens_restore import PATCH
from vllm_ext.testing import applied

VOCAB = 40
INF = float("inf")

# Operations whose result has a size, or a value for the host, that depends on data.
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.equal.default,
    aten._to_copy.default,  # nothing here has a reason to change place or type
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class NoWaiting(TorchDispatchMode):
    """Raise on an operation that makes the host wait for the GPU on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise AssertionError(f"{func} makes the host wait")
        if func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            raise AssertionError(f"{func} with a boolean mask makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def processor():
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    return MinTokensLogitsProcessor(None, torch.device("cpu"), is_pin_memory=False)


def stock(processor, logits, *slices):
    expected = logits.clone()
    processor._mask_stop_token_logits(expected, *slices)
    return expected


def patched(processor, logits, *slices):
    actual = logits.clone()
    with applied(PATCH), NoWaiting():
        processor._mask_stop_token_logits(actual, *slices)
    return actual


def assert_bits_equal(actual, expected):
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def entries(pairs, dtype=torch.int32):
    rows, tokens = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(rows, dtype=dtype), torch.tensor(tokens, dtype=dtype)


def grammar_logits(rows, generator):
    """Logits in which a grammar left anything from no token to all of them."""
    logits = torch.randn(rows, VOCAB, generator=generator)
    for row in logits:
        kept = int(torch.randint(0, VOCAB + 1, (), generator=generator))
        kept = [0, 1, 2, kept][int(torch.randint(0, 4, (), generator=generator))]
        row[torch.randperm(VOCAB, generator=generator)[kept:]] = -INF
    return logits


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_same_bits_as_stock(processor, dtype):
    """Random rows, stop sets that overlap what the grammar left, special values."""
    generator, choose = torch.Generator().manual_seed(0), random.Random(0)
    for _ in range(150):
        rows = choose.randint(1, 6)
        logits = grammar_logits(rows, generator)
        for value in (INF, float("nan"), -0.0):
            if choose.random() < 0.3:
                logits[choose.randrange(rows), choose.randrange(VOCAB)] = value
        masked, spared = [], []
        for row in choose.sample(range(rows), choose.randint(1, rows)):
            left = logits[row].isfinite().nonzero().flatten().tolist()
            stops = set(choose.sample(range(VOCAB), choose.randint(1, 3)))
            stops |= set(choose.sample(left, min(len(left), choose.randint(0, 3))))
            pairs = [(row, token) for token in stops]
            masked += pairs
            if choose.random() < 0.7:
                spared += pairs
        if not spared:
            continue
        slices = entries(masked, dtype), entries(spared, dtype)
        assert_bits_equal(
            patched(processor, logits, *slices), stock(processor, logits, *slices)
        )


def row_of(values):
    logits = torch.full((1, VOCAB), -INF)
    for token, value in values.items():
        logits[0, token] = value
    return logits


@pytest.mark.parametrize(
    ("values", "stops", "left"),
    [
        pytest.param({3: 1.0}, [3], {3: 1.0}, id="the only token is a stop token"),
        pytest.param({3: 1.0, 5: 0.5}, [3, 5], {3: 1.0, 5: 0.5}, id="both are"),
        pytest.param({3: 1.0, 5: 0.5}, [3], {5: 0.5}, id="another token is left"),
        pytest.param({}, [3], {}, id="no token was left before"),
        pytest.param({3: INF}, [3], {}, id="infinity is not given back"),
        pytest.param({3: 1.0, 4: INF}, [3, 4], {3: 1.0}, id="finite beside infinite"),
        pytest.param({3: -0.0}, [3], {3: -0.0}, id="a zero keeps its sign"),
        pytest.param({3: 1.0}, [3, 3], {3: 1.0}, id="an entry twice"),
    ],
)
def test_edges(processor, values, stops, left):
    logits, slices = row_of(values), entries([(0, token) for token in stops])
    expected = stock(processor, logits, slices, slices)
    assert_bits_equal(expected, row_of(left))
    assert_bits_equal(patched(processor, logits, slices, slices), expected)


def test_a_nan_elsewhere_keeps_the_row_masked(processor):
    logits, slices = row_of({3: 1.0, 7: float("nan")}), entries([(0, 3)])
    actual = patched(processor, logits, slices, slices)
    assert actual[0, 3] == -INF
    assert_bits_equal(actual, stock(processor, logits, slices, slices))


def test_rows_out_of_order_and_nothing_to_spare(processor):
    logits = torch.cat([row_of({3: 1.0})] * 3)
    for spared in ([(2, 3), (0, 3), (2, 4)], []):
        slices = entries([(0, 3), (1, 3), (2, 3), (2, 4)]), entries(spared)
        assert_bits_equal(
            patched(processor, logits, *slices), stock(processor, logits, *slices)
        )


def test_an_entry_that_was_not_masked_keeps_its_value(processor):
    """No caller asks for it; stock leaves it alone, whatever it holds."""
    logits = torch.cat([row_of({3: 1.0}), row_of({4: 2.0, 5: 3.0})])
    slices = entries([(0, 3)]), entries([(0, 3), (1, 4)])
    assert_bits_equal(
        patched(processor, logits, *slices), stock(processor, logits, *slices)
    )


def test_stock_waits_and_the_patch_does_not(processor):
    slices = entries([(0, 3)])
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        processor._mask_stop_token_logits(row_of({3: 1.0}), slices, slices)
    patched(processor, row_of({3: 1.0}), slices, slices)


def state(min_tokens, outputs, stops, structured):
    return (min_tokens, [0] * outputs, set(stops), structured)


@pytest.mark.parametrize("seed", range(20))
def test_whole_processor_with_and_without_drafts(processor, seed):
    """Through the two callers, with the slices that they make."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    drafts = [choose.randint(0, 3) for _ in range(4)]
    processor.min_toks = {
        request: state(
            choose.randint(1, 5),
            choose.randint(0, 3),
            choose.sample(range(VOCAB), choose.randint(0, 3)),
            choose.random() < 0.7,
        )
        for request in choose.sample(range(4), choose.randint(1, 4))
    }
    pairs = [
        (request, token, structured)
        for request, (_, _, stops, structured) in processor.min_toks.items()
        for token in stops
    ]
    processor.logits_slice = entries([pair[:2] for pair in pairs])
    processor.restore_logits_slice = entries([pair[:2] for pair in pairs if pair[2]])
    try:
        plain = grammar_logits(4, generator)
        drafted = grammar_logits(max(sum(drafts), 1), generator)
        expected = (
            processor.apply(plain.clone()),
            processor.apply_with_spec_decode(drafted.clone(), drafts),
        )
        with applied(PATCH):
            actual = (
                processor.apply(plain.clone()),
                processor.apply_with_spec_decode(drafted.clone(), drafts),
            )
        for ours, theirs in zip(actual, expected, strict=True):
            assert_bits_equal(ours, theirs)
    finally:
        processor.min_toks = {}


def test_only_this_method_is_replaced(processor):
    """Masking without structured outputs does not reach the patch."""
    processor.min_toks = {0: state(5, 0, [3], False)}
    processor.logits_slice, processor.restore_logits_slice = (
        entries([(0, 3)]),
        entries([]),
    )
    try:
        with applied(PATCH) as outcome:
            logits = processor.apply(row_of({3: 1.0}))
        assert logits[0, 3] == -INF
        assert not outcome.calls
    finally:
        processor.min_toks = {}
