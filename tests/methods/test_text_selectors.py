"""BM25, DSIR and selection by sentence embeddings on given texts and vectors, against slow transcriptions."""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, DataError
from dataflex.select.rules import Rule
from dataflex.select.scoring import Aggregate
from dataflex.select.words import Okapi, cut_words, word_punct
from dataflex.selectors.nearest import Embed
from dataflex.selectors.texts import Bm25, Dsir, drawn_ratios, effective_size, hasher
from dataflex.testing import FakeSignals, example_context
from tests.methods.oracles import oracle_top_rows
from tests.methods.test_embedding_selectors import GivenVectors

BY_TEXT = pytest.mark.parametrize("method", [Bm25, Dsir])
LETTERS = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=9), min_size=2, max_size=12)


class GivenTexts(FakeSignals):
    """Answers questions about texts with given ones, whatever the part."""

    def __init__(self, rows, targets):
        super().__init__(np.ones(len(rows)), targets={name: np.ones(len(found)) for name, found in targets.items()})
        self.given = {None: rows, **targets}

    def texts(self, rows, *, target=None, part="all"):
        super().texts(rows, target=target, part=part)
        return [self.given[target][row] for row in rows]


def pool_of(count):
    return np.arange(count, dtype=np.int64)


def context(rows, *targets, signals=GivenTexts, **options):
    named = {f"task{t}": found for t, found in enumerate(targets)}
    return example_context({"all": len(rows)}, signals=signals(rows, named), targets=tuple(named), **options)


def choose(method, rows, *targets, budget, seed=0, **params):
    return method(method.Params(**params)).select(pool_of(len(rows)), budget, context(rows, *targets, seed=seed))


def test_how_texts_are_cut():
    assert cut_words("It's a Test, twice: TEST!\n x-y") == ["its", "a", "test", "twice", "test", "xy"]
    assert word_punct("It's 3.5!? \n") == ["it", "'", "s", "3", ".", "5", "!?"]
    assert cut_words(" ?! ") == word_punct("  ") == []


def test_each_character_of_a_script_without_spaces_is_a_word():
    assert cut_words("GPT-4\u6a21\u578b\uff0c\u3067\u3059\u3002") == ["gpt4", "\u6a21", "\u578b", "\u3067", "\u3059"]
    assert word_punct("\u6a21\u578b\uff0c") == ["\u6a21", "\u578b", "\uff0c"]
    assert cut_words("\u0e17\u0e35\u0e48\u0e44\u0e17\u0e22") == ["\u0e17\u0e35\u0e48", "\u0e44", "\u0e17", "\u0e22"]


def test_vowel_signs_and_accents_are_part_of_their_word():
    hindi, tamil, accented = "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd", "e\u0301te\u0301"
    assert word_punct(f"{hindi} {tamil}, {accented}!") == [hindi, tamil, ",", accented, "!"]
    assert word_punct("\u0e17\u0e35\u0e48") == ["\u0e17\u0e35\u0e48"]
    assert word_punct("\u2764\ufe0f") == ["\u2764\ufe0f"], "a sign on no letter"


@given(text=st.text(st.characters(max_codepoint=0x5FF, exclude_categories=("Mn", "Me", "Cs"))))
def test_words_with_spaces_between_are_cut_as_published(text):
    assert cut_words(text) == text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    assert word_punct(text) == re.findall(r"\w+|[^\w\s]+", text.lower())


@BY_TEXT
def test_chinese_rows_like_the_target_come_first(method):
    """'Which is the capital of China' is near that of Japan, not 'Write a poem of spring', 'Explain this sentence'."""
    rows = [
        "\u8bf7\u5199\u4e00\u9996\u6625\u5929\u7684\u8bd7",
        "\u65e5\u672c\u9996\u90fd\u662f\u54ea\u91cc",
        "\u89e3\u91ca\u8fd9\u53e5\u8bdd",
    ]
    chosen = choose(method, rows, ["\u4e2d\u56fd\u9996\u90fd\u662f\u54ea\u91cc\uff1f"], budget=1, rule=Rule.of("top_k"))
    assert chosen.rows.tolist() == [1]
    assert len(set(chosen.scores.tolist())) == 3


# ---------------------------------------------------------------- BM25


def oracle_bm25(documents, query, k1=1.5, b=0.75, epsilon=0.25):
    """One document and one word at a time."""
    num, mean = len(documents), sum(map(len, documents)) / len(documents)
    idf = {}
    for word in {word for document in documents for word in document}:
        df = sum(word in document for document in documents)
        idf[word] = math.log(num - df + 0.5) - math.log(df + 0.5)
    average = sum(idf.values()) / len(idf)
    scores = []
    for document in documents:
        total = 0.0
        for word in query:
            tf = document.count(word)
            if tf:
                weight = idf[word] if idf[word] >= 0 else epsilon * average
                total += weight * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(total)
    return scores


def test_the_sheets_toy_of_bm25():
    index = Okapi([["a", "b"], ["b", "c"], ["c", "d"]], {"a"})
    assert index.idf["a"] == pytest.approx(0.510826, abs=1e-6)
    np.testing.assert_allclose(index.scores({"a": 1}), [0.510826, 0.0, 0.0], atol=1e-6)
    chosen = choose(Bm25, ["a b", "b c", "c d"], ["a"], budget=2)
    np.testing.assert_allclose(chosen.scores, [0.510826, 0.0, 0.0], atol=1e-6)
    assert chosen.rows.tolist() == [0, 1]
    assert Okapi([["a", "b"], ["b", "c"]], {"a"}).idf["a"] == 0.0  # N = 2, df = 1


@given(documents=LETTERS, query=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_bm25_equals_the_transcription_and_the_library_of_the_paper(documents, query):
    from rank_bm25 import BM25Okapi

    assume(any(documents))
    got = Okapi(documents, set(query)).scores(Counter(query))
    np.testing.assert_allclose(got, oracle_bm25(documents, query), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got, BM25Okapi(documents).get_scores(query), rtol=1e-10, atol=1e-12)


@given(documents=LETTERS, budget=st.integers(0, 15), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_bm25_takes_the_mean_within_a_target_and_the_largest_over_targets(documents, budget, seed):
    assume(any(documents))
    rng = np.random.default_rng(seed)
    targets = [[" ".join(rng.choice(list("abcdefg"), size=3)) for _ in range(count)] for count in (1, 3)]
    by_task = []
    for target in targets:
        by_task.append(np.mean([oracle_bm25(documents, query.split()) for query in target], axis=0))
    want = np.max(by_task, axis=0)
    want[[not document for document in documents]] = np.nan
    chosen = choose(Bm25, [" ".join(document) for document in documents], *targets, budget=budget)
    np.testing.assert_allclose(chosen.scores, want, rtol=1e-9, atol=1e-12)
    assert chosen.rows.tolist() == oracle_top_rows(chosen.scores.tolist(), budget)


def test_target_rows_take_turns():
    rows = ["apple pie", "apple tart", "apple", "zebra stripes", "none of them", "at all here"]
    target = ["apple pie tart", "zebra"]
    assert choose(Bm25, rows, target, budget=2).rows.tolist() == [0, 1]
    assert set(choose(Bm25, rows, target, budget=2, rule=Rule.of("round_robin")).rows.tolist()) == {0, 3}
    two = choose(Bm25, rows, ["apple pie tart"], ["zebra"], budget=2, rule=Rule.of("round_robin"))
    assert two.rows.tolist() == [0, 3]


def test_a_pool_is_counted_once():
    ctx = context(["a b", "c d", "e f"], ["a"])
    selector = Bm25(Bm25.Params())
    for _ in range(3):
        selector.select(pool_of(3), 2, ctx)
    assert len(ctx.signals.calls) == 2
    selector.select(pool_of(2), 2, ctx)
    assert len(ctx.signals.calls) == 4


def test_which_part_is_compared():
    for method, default in ((Bm25, "prompt"), (Dsir, "all")):
        for params, part in (({}, default), ({"part": "completion"}, "completion")):
            ctx = context(["a b", "c d"], ["a"])
            method(method.Params(**params)).select(pool_of(2), 1, ctx)
            assert {call.options["part"] for call in ctx.signals.calls} == {part}


# ---------------------------------------------------------------- DSIR


def oracle_bucket(gram, buckets):
    return int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets


def oracle_dsir(rows, target, buckets, smoothing):
    """Log weights of rows, by dictionaries of counts."""

    def grams(text):
        words = re.findall(rf"\w+|[{re.escape(string.punctuation)}]+", text.lower())
        return words + [f"{first} {second}" for first, second in pairwise(words)]

    def counts(texts):
        return Counter(oracle_bucket(gram, buckets) for text in texts for gram in grams(text))

    in_target, in_pool = counts(target), counts(rows)

    def ratio(bucket):
        p_pool = in_pool[bucket] / in_pool.total()
        found, expected = in_target[bucket], in_target.total() * p_pool
        if smoothing:
            return math.log((found + smoothing) / (expected + smoothing))
        return math.log(found / in_target.total() + 1e-8) - math.log(p_pool + 1e-8)

    found = [sum(ratio(oracle_bucket(gram, buckets)) for gram in grams(row)) for row in rows]
    return [weight if grams(row) else math.nan for weight, row in zip(found, rows, strict=True)]


def test_the_sheets_toy_of_dsir():
    ratios = drawn_ratios(np.array([1, 1]), np.array([0.8, 0.2]), 0.0)
    np.testing.assert_allclose(ratios, [-0.4700, 0.9163], atol=5e-5)
    assert np.dot([3, 1], ratios) == pytest.approx(-0.4937, abs=5e-5)
    assert np.dot([1, 3], ratios) == pytest.approx(2.2789, abs=5e-5)


def test_buckets_do_not_depend_on_the_process():
    assert hasher(10_000, 2)(["the", "cat"]) == [oracle_bucket(gram, 10_000) for gram in ("the", "cat", "the cat")]
    assert hasher(10_000, 1)(["the", "cat"]) == [oracle_bucket(gram, 10_000) for gram in ("the", "cat")]
    assert hasher(7, 3)(["a", "b", "c"]) == [oracle_bucket(gram, 7) for gram in ("a", "b", "c", "a b", "b c", "a b c")]


def test_a_prior_draws_towards_the_pool():
    """Of 4 n-grams 2, 1, 1 and 0 are expected: log (3 + 2) / (2 + 2), (1 + 2) / (1 + 2), (0 + 2) / (1 + 2), 2 / 2."""
    found = drawn_ratios(np.array([3, 1, 0, 0]), np.array([0.5, 0.25, 0.25, 0.0]), 2.0)
    np.testing.assert_allclose(found, np.log([1.25, 1.0, 2 / 3, 1.0]), rtol=1e-12)
    rare = drawn_ratios(np.array([100, 0]), np.array([1 - 1e-6, 1e-6]), 3.0)
    np.testing.assert_allclose(rare, 0.0, atol=1e-4)  # what could not be expected is no loss
    published = drawn_ratios(np.array([1, 1]), np.array([0.8, 0.2]), 0.0)
    np.testing.assert_allclose(published, [-0.4700, 0.9163], atol=5e-5)


@pytest.mark.parametrize("seed", range(4))
def test_with_a_small_target_long_rows_of_its_kind_go_before_short_ones_of_another(seed):
    rng = np.random.default_rng(seed)
    topic, other, rare = ([f"{kind}{i}" for i in range(count)] for kind, count in (("t", 60), ("o", 60), ("r", 3000)))

    def text(kind, length):
        return " ".join(rng.choice(rare if rng.random() < 0.2 else kind) for _ in range(length))

    rows = [text(topic, 60) for _ in range(20)] + [text(other, 6) for _ in range(200)]
    target = [text(topic, 40) for _ in range(4)]
    by_default = choose(Dsir, rows, target, budget=20, rule=Rule.of("top_k")).rows
    assert set(by_default.tolist()) == set(range(20))
    published = choose(Dsir, rows, target, budget=20, rule=Rule.of("top_k"), smoothing=0.0).rows
    assert not set(published.tolist()) & set(range(20)), "the shortest, whatever they say"


@given(seed=st.integers(0, 999), buckets=st.sampled_from([2, 16, 300]), smoothing=st.sampled_from([0.0, 1e-5, 1.0, 50]))
@settings(max_examples=60, deadline=None)
def test_log_weights(seed, buckets, smoothing):
    rng = np.random.default_rng(seed)
    words = ["one", "Two", "three!", "4.5", "five"]
    rows = [" ".join(rng.choice(words, size=rng.integers(0, 7))) for _ in range(12)] + ["one"]
    targets = [[" ".join(rng.choice(words, size=4)) for _ in range(2)] for _ in range(2)]
    chosen = choose(Dsir, rows, *targets, budget=3, buckets=buckets, smoothing=smoothing)
    want = oracle_dsir(rows, [*targets[0], *targets[1]], buckets, smoothing)
    np.testing.assert_allclose(chosen.scores, want, rtol=1e-9, atol=1e-9)
    top = choose(Dsir, rows, *targets, budget=5, buckets=buckets, smoothing=smoothing, rule=Rule.of("top_k"))
    assert top.rows.tolist() == oracle_top_rows(top.scores.tolist(), 5)


@pytest.mark.slow
def test_draws_follow_the_weights():
    """One bucket each for a and b: the weights of single-word rows are p_t / p_r."""
    rows = ["a", "b", "b", "b"]
    firsts = [choose(Dsir, rows, ["a b"], budget=1, ngrams=1, smoothing=0.0, seed=seed).rows[0] for seed in range(3000)]
    shares = np.bincount(firsts, minlength=4) / 3000
    weight_a, weight_b = 0.5 / 0.25, 0.5 / 0.75
    total = weight_a + 3 * weight_b
    np.testing.assert_allclose(shares, [weight_a / total, *[weight_b / total] * 3], atol=0.03)


def test_a_draw_is_keyed_by_row():
    """Which rank counts, or in which order the pool comes, does not change what is drawn."""
    rows = [f"{'abcdef'[i % 6]} {'xyz'[i % 3]}" for i in range(40)]
    ctx = context(rows, ["a x", "b y"], seed=3)
    straight = Dsir(Dsir.Params(smoothing=1.0)).select(pool_of(40), 12, ctx)
    turned = Dsir(Dsir.Params(smoothing=1.0)).select(pool_of(40)[::-1].copy(), 12, ctx)
    assert straight.rows.tolist() == turned.rows.tolist()


def test_each_target_by_itself():
    rows = ["apple pie"] * 6 + ["zebra stripes"] * 6
    given = {"task0": 2, "task1": 1}
    chosen = choose(
        Dsir, rows, ["apple pie"], ["zebra stripes"], budget=6, rule=Rule.of("top_k"), target_proportions=given
    )
    assert chosen.rows.tolist() == [0, 1, 2, 3, 6, 7]
    drawn = choose(Dsir, rows, ["apple pie"], ["zebra stripes"], budget=12, target_proportions=given)
    assert sorted(drawn.rows.tolist()) == list(range(12))
    with pytest.raises(ValueError, match="target_proportions"):
        Dsir.Params(target_proportions={"task0": 0})


def test_proportions_of_targets_hold_over_small_selections():
    """Of 2 rows a fifth is less than half a row; what is rounded off is carried on, over checkpoints too."""
    rows = ["apple pie"] * 6 + ["zebra stripes"] * 6
    params = Dsir.Params(target_proportions={"task0": 4, "task1": 1}, rule=Rule.of("top_k"))
    dsir, counts = Dsir(params), np.zeros(2)
    for _ in range(5):
        chosen = dsir.select(pool_of(12), 2, context(rows, ["apple pie"], ["zebra stripes"]))
        counts += np.bincount(chosen.rows // 6, minlength=2)
        state, dsir = dsir.state_dict(), Dsir(params)
        dsir.load_state_dict(state)
    assert counts.tolist() == [8, 2]


def test_length_weighs_as_published_and_can_be_divided_out():
    rows = ["a", "a a a", "b"]
    published = choose(Dsir, rows, ["a a a b"], budget=1, ngrams=1, buckets=50).scores
    assert published[1] == pytest.approx(3 * published[0])
    divided = choose(Dsir, rows, ["a a a b"], budget=1, ngrams=1, buckets=50, per_ngram=True).scores
    assert divided[1] == pytest.approx(divided[0])


def test_short_rows_can_be_left_out():
    rows = ["a b c", "a", "a b"]
    chosen = choose(Dsir, rows, ["a b"], budget=3, min_ngrams=3)
    assert sorted(chosen.rows.tolist()) == [0, 2]
    assert "1 rows have too few n-grams" in chosen.reason
    with pytest.raises(ConfigError, match=r"min_ngrams: 50 is more than any row has \(at most 5\)"):
        choose(Dsir, rows, ["a b"], budget=3, min_ngrams=50)


def test_the_effective_sample_size():
    assert effective_size(np.log([1.0, 1.0, 1.0, 1.0])) == pytest.approx(4.0)
    assert effective_size(np.array([1000.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert "effective sample size 2;" in choose(Dsir, ["a", "a", ""], ["a"], budget=1).reason


# ---------------------------------------------------------------- both


@BY_TEXT
def test_texts_that_say_nothing(method):
    with pytest.raises(DataError, match=r"target 'task0' has 0 rows, none of which has a word"):
        choose(method, ["a", "b"], [], budget=1)
    with pytest.raises(DataError, match=r"target 'task1' has 1 rows, none of which has a word"):
        choose(method, ["a", "b"], ["a"], [" "], budget=1)
    with pytest.raises(DataError, match=r"none of 2 rows has a word"):
        choose(method, ["", " "], ["a"], budget=1)
    with pytest.raises(DataError, match="or set 'part: all'"):
        choose(method, ["", " "], ["a"], budget=1, part="prompt")


@BY_TEXT
def test_equal_rows_and_rows_without_words(method):
    chosen = choose(method, ["a b"] * 4 + [""], ["a b"], budget=10)
    assert sorted(chosen.rows.tolist()) == [0, 1, 2, 3]
    assert len(set(chosen.scores[:4].tolist())) == 1
    assert np.isnan(chosen.scores[4])
    if method is Bm25:
        assert chosen.rows.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- embeddings


@given(seed=st.integers(0, 500), budget=st.integers(0, 25), num_targets=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_embed_is_the_mean_cosine_within_a_target_and_the_largest_over_targets(seed, budget, num_targets):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(20, 4))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    targets = []
    for _ in range(num_targets):
        vectors = rng.normal(size=(rng.integers(1, 5), 4))
        targets.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    for aggregate, reduce in (("mean_then_max", np.mean), ("max", np.max)):
        ctx = context(unit, *targets, signals=GivenVectors)
        chosen = Embed(Embed.Params(aggregate=Aggregate.of(aggregate))).select(pool_of(20), budget, ctx)
        want = np.max([reduce(target @ unit.T, axis=0) for target in targets], axis=0)
        np.testing.assert_allclose(chosen.scores, want, atol=1e-6)
        assert chosen.rows.tolist() == oracle_top_rows(chosen.scores.tolist(), budget)


def test_embed_differs_from_its_relatives_on_the_sheets_toy():
    """Similarities [[.9,.8,.1],[.95,.2,.3]]: by mean rows 0 and 1, in turns rows 0 and 2."""
    toy = np.array([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]])
    for params, rows in (({}, [0, 1]), ({"rule": Rule.of("round_robin")}, [0, 2])):
        ctx = context(np.eye(3), toy, signals=GivenVectors)
        assert Embed(Embed.Params(**params)).select(pool_of(3), 2, ctx).rows.tolist() == rows
    ctx = context(np.eye(3), [toy[0]], [toy[1]], signals=GivenVectors)
    assert Embed(Embed.Params(rule=Rule.of("round_robin"))).select(pool_of(3), 2, ctx).rows.tolist() == [0, 2]


def test_embed_without_vectors():
    vectors = np.eye(3)
    vectors[1] = np.nan
    ctx = context(vectors, np.eye(3)[:1], signals=GivenVectors)
    chosen = Embed(Embed.Params()).select(pool_of(3), 3, ctx)
    assert chosen.rows.tolist() == [0, 2]
    with pytest.raises(DataError, match="target 'task0' has 0 rows"):
        Embed(Embed.Params()).select(pool_of(3), 1, context(np.eye(3), np.zeros((0, 3)), signals=GivenVectors))
