"""What training and held-out data have in common: all that is planted is found, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.leaks import NEAR, PASSAGE, Leaks, find_leaks

Tokens = list[int]
VOCABULARY = 30_000


class Corpora:
    """Makes small corpora."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0

    def parts(self, examples: list[Tokens], cuts: tuple[int, ...] = ()) -> list[Corpus]:
        """The examples as one corpus, or as several that end at the cuts."""
        found = []
        for start, end in zip((0, *cuts), (*cuts, len(examples)), strict=True):
            self.made += 1
            writer = CorpusWriter(self.folder / str(self.made), {"input_ids": Column("uint16")})
            for example in examples[start:end]:
                writer.add({"input_ids": np.array(example, np.uint16)})
            found.append(writer.finish({}))
        return found

    def leaks(self, train: list[Tokens], held_out: list[Tokens], *, within: bool = False) -> Leaks:
        return find_leaks(self.parts(train), self.parts(held_out), within=within)


@pytest.fixture
def corpora(tmp_path: Path) -> Corpora:
    return Corpora(tmp_path)


def text(chance: random.Random, length: int, vocabulary: int = VOCABULARY) -> Tokens:
    return chance.choices(range(vocabulary), k=length)


def texts(seed: int, count: int, shortest: int = 40, longest: int = 200) -> list[Tokens]:
    chance = random.Random(seed)
    return [text(chance, chance.randint(shortest, longest)) for _ in range(count)]


def windows(example: Tokens, width: int) -> set[tuple[int, ...]]:
    return {tuple(example[at : at + width]) for at in range(len(example) - width + 1)}


def marked(found: np.ndarray) -> list[int]:
    return [int(number) for number in np.flatnonzero(found)]


def test_copies_are_found_with_their_partner_and_how_alike_they_are(corpora: Corpora) -> None:
    train, held_out = texts(1, 50), texts(2, 20)
    train[7], train[31] = held_out[3], [*held_out[4][:20], 5, *held_out[4][20:]]
    found = corpora.leaks(train, held_out)
    assert marked(found.near) == [7, 31]
    assert [(one, other) for one, other, _ in found.shown] == [(7, 3), (31, 4)]
    exact = [
        len(windows(train[a], 5) & windows(held_out[b], 5)) / len(windows(train[a], 5) | windows(held_out[b], 5))
        for a, b, _ in found.shown
    ]
    assert [index for *_, index in found.shown] == pytest.approx(exact)
    assert found.held_out_covered == 2


@pytest.mark.parametrize(("dropped", "near"), [(0, True), (10, True), (18, True), (24, False), (60, False)])
def test_from_which_likeness_on_it_counts(corpora: Corpora, dropped: int, near: bool) -> None:
    """Of 104 tokens, which are 100 windows, some are missing at the end."""
    (held_out,) = texts(3, 1, 104, 104)
    found = corpora.leaks([held_out[: 104 - dropped]], [held_out])
    assert (100 - dropped) / 100 >= NEAR if near else (100 - dropped) / 100 < NEAR
    assert bool(found.near[0]) is near


def test_parts_are_counted_on(tmp_path: Path, corpora: Corpora) -> None:
    train, held_out = texts(1, 60), texts(2, 30)
    for mine, other in ((0, 29), (19, 0), (20, 11), (59, 12)):
        train[mine] = held_out[other]
    whole = find_leaks(corpora.parts(train), corpora.parts(held_out))
    cut = find_leaks(corpora.parts(train, (19, 20, 20, 50)), corpora.parts(held_out, (0, 12)))
    assert marked(whole.near) == marked(cut.near) == [0, 19, 20, 59]
    assert sorted(cut.shown) == sorted(whole.shown)
    assert [(one, other) for one, other, _ in whole.shown] == [(0, 29), (19, 0), (20, 11), (59, 12)]
    assert marked(cut.passages) == marked(whole.passages)
    assert cut.held_out_covered == whole.held_out_covered == 4


def test_an_example_within_a_longer_one_is_found_where_that_is_asked_for(corpora: Corpora) -> None:
    train, tests = texts(1, 30, 500, 900), texts(2, 40, 20, 60)
    train[3][100:100] = tests[8]
    train[12] += tests[0] + tests[1]
    train[20][10:10] = tests[5][: len(tests[5]) // 2]
    found = corpora.leaks(train, tests, within=True)
    assert marked(found.near) == [3, 12]
    assert (found.shown[0][:2], found.shown[0][2]) == ((3, 8), 1.0)
    assert found.held_out_covered == 3
    assert marked(corpora.leaks(train, tests).near) == [], "two examples as a whole are not alike"


def test_a_short_example_within_another_is_found_beside_a_part_of_a_long_one(corpora: Corpora) -> None:
    """The held-out example that has most in common is not the one that is all there."""
    long, short = texts(4, 1, 300, 300)[0], texts(5, 1, 30, 30)[0]
    train = [long[50:100] + short]
    found = corpora.leaks(train, [long, short], within=True)
    assert marked(found.near) == [0]
    assert found.shown[0][1] == 1


def test_a_copy_of_a_short_example_is_found_though_a_long_one_holds_it_too(corpora: Corpora) -> None:
    (short,) = texts(5, 1, 40, 40)
    long = [*texts(6, 1, 200, 200)[0], *short]
    changed = [*short[:38], 1, 2]
    held_out = [long, changed]
    found = corpora.leaks([short], held_out)
    assert marked(found.near) == [0]
    assert found.shown[0][1] == 1


def test_windows_that_stand_often_in_an_example_count_once(corpora: Corpora) -> None:
    (example,) = texts(7, 1, 100, 100)
    assert marked(corpora.leaks([[*example, *[9] * 300]], [example]).near) == [0]
    assert marked(corpora.leaks([example], [[*example, *[9] * 300]]).near) == [0]


@pytest.mark.parametrize(("length", "found"), [(PASSAGE - 1, False), (PASSAGE, True), (2 * PASSAGE, True)])
@pytest.mark.parametrize("within", [False, True])
def test_long_passages(corpora: Corpora, length: int, found: bool, within: bool) -> None:
    train, held_out = texts(1, 20, 300, 400), texts(2, 20, 300, 400)
    train[4][50 : 50 + length] = held_out[9][200 : 200 + length]
    train[5][-length:] = held_out[10][:length]
    train[6][:length] = held_out[11][-length:]
    leaks = corpora.leaks(train, held_out, within=within)
    assert marked(leaks.passages) == ([4, 5, 6] if found else [])
    assert (marked(leaks.near), leaks.held_out_covered) == ([], 0)


def test_a_passage_does_not_go_on_into_the_next_example(corpora: Corpora) -> None:
    held_out = texts(2, 5, 100, 100)
    half = PASSAGE // 2
    train = [
        [*text(random.Random(3), 50), *held_out[0][:half]],
        [*held_out[0][half : 2 * half], *text(random.Random(4), 50)],
    ]
    assert marked(corpora.leaks(train, held_out).passages) == []
    assert marked(corpora.leaks([train[0] + train[1]], held_out).passages) == [0]


@pytest.mark.parametrize("within", [False, True])
def test_what_many_held_out_examples_share_does_not_count(corpora: Corpora, within: bool) -> None:
    """What a template writes around each example, here more than the examples themselves."""
    (template,) = texts(8, 1, 120, 120)
    train, held_out = ([template[:80] + own + template[80:] for own in texts(seed, 60, 30, 40)] for seed in (1, 2))
    train[5] = held_out[6]
    found = corpora.leaks(train, held_out, within=within)
    assert marked(found.near) == [5]
    assert marked(found.passages) == [5]
    assert found.held_out_covered == 1


def test_an_example_that_is_held_out_several_times_is_found(corpora: Corpora) -> None:
    held_out = texts(2, 50)
    held_out += [held_out[0]] * 5
    found = corpora.leaks([[*held_out[0], 5], *texts(1, 5)], held_out)
    assert marked(found.near) == [0]


def test_a_template_alone_is_no_leak(corpora: Corpora) -> None:
    (template,) = texts(8, 1, 120, 120)
    held_out = [template + own for own in texts(2, 60, 30, 40)]
    found = corpora.leaks([template] * 3, held_out)
    assert (marked(found.near), marked(found.passages), found.held_out_covered) == ([], [], 0)


@pytest.mark.parametrize("within", [False, True])
def test_texts_that_have_nothing_in_common_are_not_found(corpora: Corpora, within: bool) -> None:
    """Of a vocabulary so small that single windows meet by chance."""
    chance = random.Random(9)
    train, held_out = ([text(chance, chance.randint(30, 300), 60) for _ in range(count)] for count in (1500, 300))
    found = corpora.leaks(train, held_out, within=within)
    assert (marked(found.near), marked(found.passages), found.held_out_covered) == ([], [], 0)
    assert found.near.shape == found.passages.shape == (1500,)


def test_examples_shorter_than_a_window_and_empty_corpora(corpora: Corpora) -> None:
    short = [[], [1], [1, 2, 3, 4], [1, 2, 3, 4, 5], [], [1, 2, 3]]
    for train, held_out, near in (
        (short, short, [3]),
        (short, [], []),
        ([], short, []),
        ([[], []], [[]], []),
        ([[1, 2, 3]], [[1, 2, 3]], []),
    ):
        for within in (False, True):
            found = corpora.leaks(train, held_out, within=within)
            assert found.near.shape == found.passages.shape == (len(train),)
            assert marked(found.near) == ([] if within else near)
    found = find_leaks([], [])
    assert (len(found.near), len(found.passages), found.held_out_covered) == (0, 0, 0)


def test_only_some_are_shown_and_all_are_counted(corpora: Corpora) -> None:
    held_out = texts(2, 100)
    found = corpora.leaks(held_out[:60], held_out)
    assert found.near.sum() == found.held_out_covered == 60
    assert [(one, other, index) for one, other, index in found.shown] == [(at, at, 1.0) for at in range(20)]


def known_windows(held_out: list[Tokens], width: int) -> tuple[list[set[tuple[int, ...]]], set[tuple[int, ...]]]:
    """The windows of each held-out example, without those that too many have; and these."""
    found = [windows(example, width) for example in held_out]
    counts = Counter(window for each in found for window in each)
    common = {window for window, count in counts.items() if count > max(3, 0.01 * len(held_out))}
    return [each - common for each in found], common


def near_by_pairs(train: list[Tokens], held_out: list[Tokens], within: bool) -> list[int]:
    """Which examples are nearly a held-out one, by comparing every pair."""
    width = 12 if within else 5
    known, common = known_windows(held_out, width)
    near = []
    for number, example in enumerate(train):
        mine = windows(example, width) - common
        if any(mine & each and len(mine & each) / len(each if within else mine | each) >= NEAR for each in known):
            near.append(number)
    return near


def cousins(chance: random.Random, held_out: list[Tokens]) -> Tokens:
    """A training example made of held-out ones, in some way."""
    one, other = chance.choice(held_out), chance.choice(held_out)
    way = chance.randrange(6)
    if way == 0:
        return text(chance, chance.randint(0, 80), 500)
    if way == 1:
        return [token if chance.random() > 0.02 else chance.randrange(500) for token in one]
    if way == 2:
        return one + other
    if way == 3:
        return one[: int(len(one) * chance.random())] + other[int(len(other) * chance.random()) :]
    if way == 4:
        return text(chance, chance.randint(0, 10), 500) + one + text(chance, chance.randint(0, 10), 500)
    return one[chance.randint(0, 6) :] + one[: chance.randint(0, 40)]


def relatives(seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """400 training and 100 held-out examples that are related in many ways."""
    chance = random.Random(seed)
    template = text(chance, 40, 500)
    held_out = [text(chance, chance.randint(0, 100), 500) for _ in range(60)]
    held_out += [template[:30] + text(chance, chance.randint(0, 60), 500) + template[30:] for _ in range(20)]
    held_out += [cousins(chance, held_out) for _ in range(20)]
    return [cousins(chance, held_out) for _ in range(400)], held_out


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_comparing_every_pair_finds(corpora: Corpora, seed: int, within: bool) -> None:
    train, held_out = relatives(seed)
    found = find_leaks(corpora.parts(train, (100, 250)), corpora.parts(held_out, (50,)), within=within)
    near = near_by_pairs(train, held_out, within)
    assert marked(found.near) == near
    assert min(len(near), 400 - len(near)) > 50


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_passages_and_covers_what_comparing_everything_does(corpora: Corpora, seed: int) -> None:
    train, held_out = relatives(seed)
    found = find_leaks(corpora.parts(train, (100, 250)), corpora.parts(held_out, (50,)))
    known, common = known_windows(held_out, 12)
    everything = {window for example in train for window in windows(example, 12)}
    assert found.held_out_covered == sum(bool(each) and len(each & everything) / len(each) >= NEAR for each in known)
    runs = {run for example in held_out for run in windows(example, PASSAGE) if not windows([*run], 12) & common}
    passages = {number for number, example in enumerate(train) if windows(example, PASSAGE) & runs}
    assert len(passages) > 50
    assert passages <= {*marked(found.passages)}
    strange = {*marked(found.passages)} - passages
    for number in strange:  # which go on from one held-out example into another, or into what many share
        every = set().union(common, *known)
        assert any(windows([*run], 12) <= every for run in windows(train[number], PASSAGE))
    assert len(strange) < 40


def test_held_out_data_compared_in_turn_are_compared_all_the_same(
    corpora: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are held in memory together."""
    rng = np.random.default_rng(5)
    held_out = [rng.integers(0, 5000, 60).tolist() for _ in range(12)]
    train = [[*held_out[n], 1, 2] for n in (1, 6, 11)] + [rng.integers(0, 5000, 60).tolist() for _ in range(5)]
    parts, learnt = corpora.parts(held_out, (3, 6, 9)), corpora.parts(train)
    whole = find_leaks(learnt, parts)
    monkeypatch.setattr("llmkit.data.leaks._TOKENS_AT_ONCE", 200)
    in_turn = find_leaks(learnt, parts)
    assert whole.shown == in_turn.shown
    assert [(example, other) for example, other, _ in in_turn.shown] == [(0, 1), (1, 6), (2, 11)]
    assert (whole.near == in_turn.near).all()
    assert (whole.passages == in_turn.passages).all()
    assert whole.held_out_covered == in_turn.held_out_covered == 3
