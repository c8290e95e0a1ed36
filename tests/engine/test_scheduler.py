"""Scheduler and blocks without a model: after any interleaving of add, step, abort and stop, every block is accounted
for, nobody reads what is not its own prefix, and every request ends.

The cache's tensors are played by a table of what was written where: a place holds the whole prefix (and salt) that its
keys and values depend on. Whatever a step reads is compared with it.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pronk.engine.cache.blocks import BlockError, BlockPool
from pronk.engine.cache.manager import CacheManager
from pronk.engine.cache.prefix import PrefixCache, chain_key, root_key
from pronk.engine.request import Request, SamplingParams
from pronk.engine.scheduler import Row, Scheduler, SchedulingError
from pronk.engine.sequence import Sequence, Status

EOS = 7
Content = tuple[str, tuple[int, ...]]


def make_sequence(
    name: str,
    prompt: list[int],
    max_tokens: int,
    *,
    salt: str = "",
    priority: int = 0,
    max_model_len: int = 10_000,
    **params: object,
) -> Sequence:
    request = Request(
        request_id=name,
        prompt=prompt,
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        cache_salt=salt,
        priority=priority,
    )
    return Sequence(request, seed=0, eos_token_ids=frozenset({EOS}), max_model_len=max_model_len, arrival=0.0)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.sampled_from([1, 2, 4, 16]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 40),
        prompt_budget=st.none() | st.integers(1, 20),
        prefix_caching=st.booleans(),
        depth=st.sampled_from([1, 2]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        prompt_budget: int | None,
        prefix_caching: bool,
        depth: int,
    ) -> None:
        """depth: steps that may run at the same time; with 2 the next is planned before the last one's tokens are
        known."""
        self.cache = CacheManager(num_blocks, block_size, enable_prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_prompt_tokens=prompt_budget,
        )
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.capacity = num_blocks * block_size
        self.depth = depth
        self.flying: list[tuple[list[Row], list[int], bool]] = []
        self.sequences: list[Sequence] = []
        self.truth: dict[Sequence, list[int]] = {}
        self.scored: dict[Sequence, list[int]] = {}
        self.written: dict[tuple[int, int], Content] = {}
        self.names = 0

    @rule(
        shared=st.integers(0, 40),
        own=st.lists(st.integers(0, 3), max_size=12),
        max_tokens=st.integers(0, 20),
        salt=st.sampled_from(["", "", "tenant"]),
        priority=st.integers(-1, 1),
        scored=st.booleans(),
    )
    def add(self, shared: int, own: list[int], max_tokens: int, salt: str, priority: int, scored: bool) -> None:
        prompt = [place % 3 for place in range(shared)] + own
        assume(prompt and len(prompt) + max_tokens <= self.capacity)
        self.names += 1
        sequence = make_sequence(
            f"r{self.names}",
            prompt,
            max_tokens,
            salt=salt,
            priority=priority,
            prompt_logprobs=0 if scored else None,
        )
        self.sequences.append(sequence)
        self.truth[sequence] = list(prompt)
        self.scored[sequence] = []
        self.scheduler.add(sequence)

    @precondition(lambda self: self.scheduler.has_work and len(self.flying) < self.depth)
    @rule(tokens=st.lists(st.integers(0, EOS), min_size=8, max_size=8), fails=st.booleans())
    def launch(self, tokens: list[int], fails: bool) -> None:
        rows = self.scheduler.schedule()
        if not rows:
            assert self.flying, "there is work, but the step is empty"
            return
        self.check_plan(rows)
        for row in rows:
            self.compute(row)
        sampling = [row.sequence for row in rows if row.samples]
        sampled = tokens[: len(sampling)]
        for sequence, token in zip(sampling, sampled, strict=True):
            self.truth[sequence].append(token)
        self.flying.append((rows, sampled, fails))

    @precondition(lambda self: self.flying)
    @rule()
    def land(self) -> None:
        rows, sampled, fails = self.flying.pop(0)
        sampling = [row.sequence for row in rows if row.samples]
        if fails and sampling:
            sampling[-1].finish("error")
        self.scheduler.commit(rows, sampled)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive()))
        sequence.finish("abort")
        self.scheduler.remove(sequence)
        assert not sequence.block_table

    @rule()
    def abort_what_has_ended(self) -> None:
        for sequence in self.sequences:
            if sequence.status is Status.FINISHED:
                self.scheduler.remove(sequence)

    def alive(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]

    def check_plan(self, rows: list[Row]) -> None:
        assert sum(row.num_tokens for row in rows) <= self.budget
        assert len({row.sequence.request_id for row in rows}) == len(rows)
        for row in rows:
            assert row.sequence.status is Status.RUNNING
            assert row.num_tokens >= 1
            assert row.end == row.sequence.num_computed <= row.sequence.num_tokens
            self.scored[row.sequence] += row.scores

    def compute(self, row: Row) -> None:
        """What a forward does: read all before the row's tokens, write the row's."""
        sequence, block_size = row.sequence, self.cache.block_size
        for place in range(row.start + row.num_tokens):
            where = (sequence.block_table[place // block_size], place % block_size)
            content = (sequence.request.cache_salt, tuple(self.truth[sequence][: place + 1]))
            if place < row.start:
                assert self.written[where] == content, f"{sequence.request_id} reads another's keys at {place}"
            else:
                assert self.cache.pool.holders(where[0]) == 1, f"{sequence.request_id} writes into a shared block"
                self.written[where] = content

    @invariant()
    def blocks_add_up(self) -> None:
        held = Counter(block for sequence in self.alive() for block in sequence.block_table)
        pool = self.cache.pool
        for block in range(pool.num_blocks):
            assert pool.holders(block) == held[block], f"block {block}"
        assert pool.num_used == len(held)
        assert pool.num_free + pool.num_used == pool.num_blocks
        assert pool.num_kept == sum(1 for b in range(pool.num_blocks) if b in self.cache.prefix and b not in held)

    @invariant()
    def everyone_is_in_one_place(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= self.max_num_seqs
        assert len(set(running) | set(waiting)) == len(running) + len(waiting)
        assert set(running) | set(waiting) == set(self.alive())
        assert all(sequence.status is Status.RUNNING for sequence in running)
        assert all(sequence.status is Status.WAITING and not sequence.block_table for sequence in waiting)
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.max_num_seqs))
        assert all(sequence.slot is None for sequence in waiting)
        assert waiting == sorted(waiting, key=lambda sequence: sequence.rank)
        if not self.flying:
            assert all(sequence.num_remaining > 0 and not sequence.pending for sequence in running)

    @invariant()
    def to_ask_is_to_find(self) -> None:
        for sequence in self.scheduler.waiting:
            if sequence.params.prompt_logprobs is None:
                found = len(self.cache.match(sequence)) * self.cache.block_size
                assert self.cache.num_cached(sequence.tokens, sequence.request.cache_salt) == found

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Each step computes at least one token of the oldest sequence, which nobody preempts.
        bound = sum(sequence.num_tokens + sequence.max_tokens for sequence in self.alive()) + 1
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            if len(self.flying) < self.depth:
                self.launch([0] * 8, False)
            if self.flying:
                self.land()
            self.blocks_add_up()
        while self.flying:
            self.land()
        assert not self.scheduler.has_work, "some request never ends"
        assert self.cache.pool.num_used == 0
        for sequence in self.sequences:
            assert sequence.finish_reason is not None
            assert sequence.tokens == self.truth[sequence][: len(sequence.tokens)]
            if sequence.params.prompt_logprobs is not None and sequence.finish_reason in ("stop", "length"):
                assert self.scored[sequence] == list(range(sequence.num_prompt - 1)), "each is told once, in order"


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase


def run_step(scheduler: Scheduler, token: int = 0) -> list[Row]:
    rows = scheduler.schedule()
    scheduler.commit(rows, [token for row in rows if row.samples])
    return rows


def make_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    *,
    budget: int = 1000,
    prompt_budget: int | None = None,
    seqs: int = 10,
    caching: bool = True,
) -> Scheduler:
    cache = CacheManager(num_blocks, block_size, enable_prefix_caching=caching)
    return Scheduler(cache, max_num_seqs=seqs, max_num_batched_tokens=budget, max_num_prompt_tokens=prompt_budget)


def test_decodes_go_before_a_long_prompt() -> None:
    scheduler = make_scheduler(budget=10)
    stream, long = make_sequence("stream", [1, 2], 50), make_sequence("long", [3] * 40, 5)
    scheduler.add(stream)
    run_step(scheduler)
    scheduler.add(long)
    for _ in range(4):
        rows = {row.sequence.request_id: row.num_tokens for row in run_step(scheduler)}
        assert rows == {"stream": 1, "long": 9}
    assert stream.num_output == 5


def test_beside_streams_prompts_take_less_of_a_step() -> None:
    scheduler = make_scheduler(num_blocks=1000, budget=30, prompt_budget=8)
    first, second, long = (make_sequence(name, [number] * 40, 9) for number, name in enumerate(("a", "b", "long")))
    scheduler.add(first)
    scheduler.add(second)
    assert [row.num_tokens for row in run_step(scheduler)] == [15, 15]  # nobody streams yet
    while first.num_remaining > 1:
        run_step(scheduler)
    scheduler.add(long)
    while second.num_remaining > 1:
        assert sum(row.num_tokens for row in run_step(scheduler)) == 1 + 8
    for _ in range(3):
        rows = {row.sequence.request_id: row.num_tokens for row in run_step(scheduler)}
        assert rows == {"a": 1, "b": 1, "long": 8}


def test_streams_alone_fill_a_step() -> None:
    scheduler = make_scheduler(budget=6, prompt_budget=2, seqs=5)
    for number in range(5):
        scheduler.add(make_sequence(str(number), [number], 9))
    while any(sequence.num_output == 0 for sequence in [*scheduler.running, *scheduler.waiting]):
        run_step(scheduler)
    assert sum(row.num_tokens for row in run_step(scheduler)) == 5


def test_a_long_prompt_leaves_room_for_the_next() -> None:
    scheduler = make_scheduler(num_blocks=1000, budget=16)
    long, short = make_sequence("long", [1] * 400, 5), make_sequence("short", [2] * 6, 5)
    scheduler.add(long)
    run_step(scheduler)
    scheduler.add(short)
    assert {row.sequence.request_id: row.num_tokens for row in run_step(scheduler)} == {"long": 10, "short": 6}
    assert short.num_output == 1
    for number in range(3):  # three more long ones cannot shut out the next either
        scheduler.add(make_sequence(f"long {number}", [3 + number] * 400, 5))
    last = make_sequence("last", [9], 5)
    scheduler.add(last)
    while not last.num_output:
        run_step(scheduler)
    assert long.num_computed < 100


def test_what_nobody_else_can_use_is_not_left_unused() -> None:
    scheduler = make_scheduler(num_blocks=1000, budget=16, seqs=1)
    scheduler.add(make_sequence("long", [1] * 400, 5))
    scheduler.add(make_sequence("waits for a place", [2] * 6, 5))
    for _ in range(3):
        assert [row.num_tokens for row in run_step(scheduler)] == [16]


def test_a_prompt_is_read_in_chunks_and_samples_once() -> None:
    scheduler = make_scheduler(budget=7)
    scheduler.add(make_sequence("a", list(range(3)) * 5, 2))
    assert [(row.start, row.num_tokens, row.samples) for row in run_step(scheduler)] == [(0, 7, False)]
    assert [(row.start, row.num_tokens, row.samples) for row in run_step(scheduler)] == [(7, 7, False)]
    assert [(row.start, row.num_tokens, row.samples) for row in run_step(scheduler)] == [(14, 1, True)]


def test_a_second_prompt_reuses_the_blocks_of_the_first() -> None:
    scheduler = make_scheduler(block_size=4)
    prompt = [0, 1, 2, 3, 4, 5, 6, 0, 1]
    scheduler.add(make_sequence("first", prompt, 1))
    run_step(scheduler)
    second = make_sequence("second", [*prompt[:8], 2, 2], 1)
    scheduler.add(second)
    assert [(row.start, row.num_tokens) for row in run_step(scheduler)] == [(8, 2)]
    assert second.num_cached == 8


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    scheduler = make_scheduler(block_size=4)
    for name in ("first", "second"):
        scheduler.add(make_sequence(name, [1] * 8, 1))
        rows = run_step(scheduler)
    assert [(row.start, row.num_tokens, row.samples) for row in rows] == [(4, 4, True)]


def test_salts_do_not_share() -> None:
    scheduler = make_scheduler(block_size=4)
    for salt in ("a", "b"):
        scheduler.add(make_sequence(salt, [1] * 9, 1, salt=salt))
        rows = run_step(scheduler)
    assert [row.start for row in rows] == [0]


def test_without_prefix_caching_nothing_is_kept() -> None:
    scheduler = make_scheduler(block_size=4, caching=False)
    for name in ("first", "second"):
        scheduler.add(make_sequence(name, [1] * 9, 1))
        rows = run_step(scheduler)
    assert [row.start for row in rows] == [0]
    assert scheduler.cache.pool.num_kept == 0


def test_what_went_wrong_is_never_found_again() -> None:
    scheduler = make_scheduler(block_size=4)
    failing = make_sequence("failing", [1] * 9, 3)
    scheduler.add(failing)
    rows = scheduler.schedule()
    failing.finish("error")
    scheduler.commit(rows, [None])
    scheduler.add(make_sequence("next", [1] * 9, 3))
    assert [row.start for row in run_step(scheduler)] == [0]


def test_the_youngest_is_preempted_and_comes_back_by_its_own_blocks() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    old, young = make_sequence("old", [1] * 8, 12), make_sequence("young", [2] * 8, 12)
    scheduler.add(old)
    scheduler.add(young)
    while not young.preemptions:
        run_step(scheduler)
    assert scheduler.num_preemptions == 1
    assert not old.preemptions
    while scheduler.has_work:
        run_step(scheduler)
    assert [s.finish_reason for s in (old, young)] == ["length", "length"]
    assert [s.num_output for s in (old, young)] == [12, 12]


def test_a_request_larger_than_the_cache_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(SchedulingError):
        scheduler.add(make_sequence("large", [1] * 8, 1))


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({}, [1, EOS], "stop", None),
        ({"ignore_eos": True}, [1, EOS, 1, 1], "length", None),
        ({"stop_token_ids": (3,)}, [1, 3], "stop", 3),
        ({"stop_token_ids": (3,), "min_tokens": 3}, [3, 3, 3], "stop", 3),
    ],
)
def test_ends(params: dict[str, object], tokens: list[int], reason: str, stop_reason: int | None) -> None:
    sequence = make_sequence("a", [1], 4, **params)
    for token in tokens:
        assert sequence.finish_reason is None
        sequence.append(token)
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)


def test_tokens_that_would_end_it_are_forbidden_before_min_tokens() -> None:
    sequence = make_sequence("a", [1], 4, min_tokens=1, stop_token_ids=(3,))
    assert sequence.ending_ids(1) == {EOS, 3}
    assert not sequence.ending_ids(2)


def test_the_context_bounds_the_answer() -> None:
    sequence = make_sequence("a", [1] * 8, 100, max_model_len=10)
    sequence.append(1)
    sequence.append(1)
    assert sequence.finish_reason == "length"


def test_pool_refuses_false_accounts() -> None:
    pool = BlockPool(2, lambda block: None)
    (block,) = pool.allocate(1)
    with pytest.raises(BlockError):
        pool.allocate(2)
    pool.release([block], keep=lambda block: False)
    with pytest.raises(BlockError):
        pool.release([block], keep=lambda block: False)
    with pytest.raises(BlockError):
        pool.share(block)


def test_the_least_recently_kept_block_is_reused_first() -> None:
    reused: list[int] = []
    pool = BlockPool(3, reused.append)
    first, second, third = pool.allocate(3)
    for block in (second, first, third):
        pool.release([block], keep=lambda block: True)
    pool.share(second)
    pool.release([second], keep=lambda block: True)
    assert pool.allocate(3) == [first, third, second]
    assert reused == [first, third, second]


def test_to_ask_what_is_cached_takes_nothing_and_changes_no_order() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    for name, token in (("older", 1), ("newer", 2)):
        scheduler.add(make_sequence(name, [token] * 7, 1))
        run_step(scheduler)
    cache = scheduler.cache
    assert (cache.pool.num_used, cache.pool.num_kept) == (0, 2)
    assert cache.num_cached([1] * 7, "") == 4
    assert (cache.pool.num_used, cache.pool.num_kept) == (0, 2)
    scheduler.add(make_sequence("other", [3] * 12, 1))  # takes two empty blocks, and the one that is reused first
    run_step(scheduler)
    assert (cache.num_cached([1] * 7, ""), cache.num_cached([2] * 7, "")) == (0, 4)


def test_a_digest_that_two_prefixes_share_is_no_hit() -> None:
    cache = PrefixCache()
    root = root_key("")
    key = chain_key(root, [1, 2])
    cache.insert(0, root, key, [1, 2])
    assert cache.find(root, key, [1, 2]) == 0
    assert cache.find(root, key, [1, 3]) is None
    assert cache.find(root_key("other"), key, [1, 2]) is None
    assert chain_key(root, [1, 2]) != chain_key(root, [2, 1])


def test_lower_priority_numbers_go_first() -> None:
    scheduler = make_scheduler(seqs=1)
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        scheduler.add(make_sequence(name, [1, 2], 1, priority=priority))
    order = []
    while scheduler.has_work:
        order += [row.sequence.request_id for row in run_step(scheduler)]
    assert order == ["urgent", "first", "second", "late"]


def test_a_prompt_can_be_read_without_an_answer() -> None:
    scheduler = make_scheduler(budget=4)
    sequence = make_sequence("a", [1] * 10, 0, prompt_logprobs=0)
    scheduler.add(sequence)
    assert [row.scores for _ in range(3) for row in run_step(scheduler)] == [range(4), range(4, 8), range(8, 9)]
    assert (sequence.finish_reason, sequence.num_output) == ("length", 0)
    assert not scheduler.has_work
