"""The executor: plans of every shape, what it refuses, and what it leaves behind when something fails."""

import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from fl_merge import Coordinate, Matrix, MergeError, RecipeError, Span, build, kernels, merge, partition
from fl_merge.execute import SWITCH_SECONDS, execute, merged_specs, worker_pool
from fl_merge.methods import slerp, task_arithmetic, ties, weighted_average
from fl_merge.ops.combine import weighted_sum
from fl_merge.shapes import WeightedSum
from fl_merge.store import MemorySink, MemorySource, SafetensorsSink, load
from fl_merge.types import BASE, Cohort, CohortSpec, Output, Read, TensorSpec, Update, Whole


def cohort(base, *clients, tied=None, **options):
    updates = tuple(Update(str(i), float(i + 1), MemorySource(client)) for i, client in enumerate(clients))
    return Cohort(MemorySource(base, tied), updates, **options)


def run(method, a_cohort, **options):
    sink = MemorySink()
    report = execute(method, a_cohort, sink, **options)
    return sink.tensors, report


class WatchedSink(MemorySink):
    """Remembers what became of it."""

    def __init__(self):
        super().__init__()
        self.events = []

    def begin(self, specs):
        super().begin(specs)
        self.events.append("begin")

    def finish(self):
        self.events.append("finish")

    def abort(self):
        super().abort()
        self.events.append("abort")


class Plan:
    """A method that is its plan."""

    def __init__(self, *outputs):
        self.outputs = outputs

    def plan(self, spec):
        return iter(self.outputs)


VECTOR = TensorSpec((2,), torch.float32)
READS = (Read(BASE, "w"), Read(0, "w"))
ONE = {"w": torch.tensor([1.0, 2.0])}
TWO = {"w": torch.tensor([3.0, 2.0])}


# --- shapes of methods -----------------------------------------------------------------------------------------------


def test_a_matrix_method_gets_rows_and_columns_and_leaves_vectors_to_the_average():
    """Matrix: the mean delta, transposed twice over its rows' order; convolution kernels come as out x rest."""
    seen = {}

    def flip_rows(deltas_NRC, weights_N):
        seen[tuple(deltas_NRC.shape)] = weights_N.tolist()
        return torch.einsum("n,nrc->rc", weights_N.to(deltas_NRC.dtype), deltas_NRC).flip(0)

    base = {
        "linear": torch.zeros(2, 3),
        "conv": torch.zeros(2, 2, 1, 2),
        "bias": torch.ones(2),
        "count": torch.tensor(4),
    }
    client = {
        "linear": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "conv": torch.arange(8.0).reshape(2, 2, 1, 2),
        "bias": torch.tensor([3.0, 1.0]),
        "count": torch.tensor(9),
    }
    result, _ = run(Matrix(flip_rows), cohort(base, client, base))
    assert seen == {(2, 2, 3): [1 / 3, 2 / 3], (2, 2, 4): [1 / 3, 2 / 3]}
    torch.testing.assert_close(result["linear"], client["linear"].flip(0) / 3)
    torch.testing.assert_close(result["conv"], client["conv"].flip(0) / 3)
    torch.testing.assert_close(result["bias"], torch.tensor([5 / 3, 1.0]))
    assert result["count"] == 4


def test_a_method_of_its_own_plan_may_change_names_shapes_and_dtypes():
    """Structure: clients' rows stacked, a tensor renamed, one new, one left out."""

    class Stack:
        def plan(self, spec: CohortSpec):
            clients = range(len(spec.client_ids))
            rows, columns = spec.tensors["a"].shape
            shape = (rows * len(clients), columns)
            reads = tuple(Read(client, "a") for client in clients)
            yield Output("stacked", TensorSpec(shape, torch.float16), reads, Whole(lambda *rows: torch.cat(rows)))
            yield Output("renamed", spec.tensors["b"], (Read(BASE, "b"),), Whole(lambda tensor: tensor))
            yield Output("ranks", TensorSpec((), torch.int64), (), Whole(lambda: torch.tensor(rows)))

    base = {"a": torch.zeros(1, 2), "b": torch.tensor([5.0]), "c": torch.zeros(3)}
    clients = [{**base, "a": torch.full((1, 2), value)} for value in (1.0, 2.0, 3.0)]
    result, report = run(Stack(), cohort(base, *clients))
    assert list(result) == ["stacked", "renamed", "ranks"]
    assert result["stacked"].dtype == torch.float16
    assert result["stacked"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert (result["renamed"].tolist(), int(result["ranks"])) == ([5.0], 1)
    assert report.tensors == 3
    assert report.bytes_read == 3 * 8 + 4
    assert report.bytes_written == 12 + 4 + 8


def test_a_span_gets_the_gram_matrix_of_the_deltas_or_of_the_weights():
    base = {"w": torch.tensor([1.0, 1.0]), "v": torch.tensor([0.0])}
    clients = [
        {"w": torch.tensor([3.0, 1.0]), "v": torch.tensor([2.0])},
        {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([1.0])},
    ]
    seen = []

    def first_client(spec, gram_NN):
        seen.append(gram_NN.tolist())
        return [1.0, 0.0]

    results = [
        run(Span(first_client, gram=True, on=on, scope=scope), cohort(base, *clients))[0]
        for on in ("deltas", "weights")
        for scope in ("tensor", "model")
    ]
    by_tensor = [[[4, 0], [0, 1]], [[4, 2], [2, 1]], [[10, 5], [5, 5]], [[4, 2], [2, 1]]]
    assert sorted(seen[:2]) == sorted(by_tensor[:2])
    assert seen[2] == [[8, 2], [2, 2]]
    assert sorted(seen[3:5]) == sorted(by_tensor[2:])
    assert seen[5] == [[14, 7], [7, 6]]
    for result in results:
        assert (result["w"].tolist(), result["v"].tolist()) == ([3.0, 1.0], [2.0])


def test_a_span_with_a_coefficient_too_few_is_a_mistake_of_its_author():
    with pytest.raises(ValueError, match=r"^1 coefficients for 2 clients$"):
        run(Span(lambda spec, gram_NN: [1.0]), cohort(ONE, TWO, TWO))


def test_a_survey_and_a_tally_see_the_whole_tensor_or_model():
    """combine puts what it knows into the result: the survey's norm of each client, the tally, its own place."""
    numel = 40_000
    base = {"b": torch.zeros(numel), "a": torch.zeros(3)}
    client = {"b": torch.ones(numel), "a": torch.full((3,), 2.0)}

    def sums(scope):
        def combine(deltas_NS, weights_N, at):
            return at.survey_NK[0].float() + torch.zeros_like(deltas_NS[0])

        def survey(delta_S):
            return delta_S.double().sum().reshape(1)

        return {
            n: set(t.tolist())
            for n, t in run(Coordinate(combine, survey, scope=scope), cohort(base, client))[0].items()
        }

    assert sums("tensor") == {"b": {40_000.0}, "a": {6.0}}
    assert sums("model") == {"b": {40_006.0}, "a": {40_006.0}}

    def places(scope):
        method = Coordinate(lambda d, w, at: at.index_S().float(), lambda delta_S: torch.zeros(1), scope=scope)
        return run(method, cohort(base, client), slice_elements=16384)[0]

    assert torch.equal(places("tensor")["b"], torch.arange(numel).float())
    assert torch.equal(places("model")["b"], torch.arange(3, numel + 3).float())  # after 'a'
    assert places("model")["a"].tolist() == [0.0, 1.0, 2.0]

    tallied = Coordinate(lambda d, w, at: torch.full_like(d[0], at.tally), tally=lambda d, w, at: d[0].sign())
    for slice_elements in (16384, 10**9):
        result, _ = run(tallied, cohort(base, client), slice_elements=slice_elements)
        assert set(result["b"].tolist()) == {40_000.0}


def test_elementwise_work_is_handed_out_in_slices_of_the_asked_size():
    """Never more than a slice of each client is in a combine's hands, and every element is in exactly one."""
    seen = []

    def combine(deltas_NS, weights_N, at):
        assert deltas_NS.shape == (2, at.stop - at.start)
        seen.append((at.start, at.stop))
        return weighted_sum(deltas_NS, weights_N)

    big = {"w": torch.zeros(100_000)}
    run(Coordinate(combine), cohort(big, big, big), slice_elements=20_000)  # rounded up to 32768
    assert sorted(seen) == [(0, 32768), (32768, 65536), (65536, 98304), (98304, 100_000)]


# --- counters, tied weights, the master ------------------------------------------------------------------------------


def test_integers_are_the_bases_and_batches_are_counted_by_the_largest():
    base = {"ids": torch.tensor([1, 2]), "bn.num_batches_tracked": torch.tensor(10), "flag": torch.tensor(True)}
    clients = [
        {"ids": torch.tensor([5, 6]), "bn.num_batches_tracked": torch.tensor(n), "flag": torch.tensor(False)}
        for n in (12, 17, 3)
    ]
    result, _ = run(ties(), cohort(base, *clients))
    assert (result["ids"].tolist(), int(result["bn.num_batches_tracked"]), bool(result["flag"])) == ([1, 2], 17, True)
    result, _ = run(ties(), cohort(base, clients[2]))
    assert int(result["bn.num_batches_tracked"]) == 10  # the base's own count too


def test_tied_weights_are_merged_once_and_written_under_both_names():
    shared = torch.tensor([1.0, 2.0])
    base = {"embed": shared, "norm": torch.ones(1), "head": shared}
    moved = torch.tensor([3.0, 2.0])
    done = []
    source_cohort = cohort(base, {"embed": moved, "norm": torch.ones(1), "head": moved})
    assert source_cohort.base.aliases() == {"head": "embed"}
    assert list(source_cohort.spec().tensors) == ["embed", "norm"]
    result, report = run(weighted_average(), source_cohort, on_tensor=done.append)
    assert list(result) == ["embed", "norm", "head"]
    assert result["embed"].tolist() == result["head"].tolist() == [3.0, 2.0]
    assert sorted(done) == ["embed", "norm"]
    assert report.tensors == 3


def test_what_only_looks_tied_is_not():
    storage = torch.arange(6.0)
    source = MemorySource(
        {"a": storage, "b": storage[:3], "c": storage.view(2, 3), "d": torch.empty(0), "e": torch.empty(0)}
    )
    assert source.aliases() == {}


def test_master_keeps_float32_and_leaves_integers_and_float64():
    base = {"h": torch.ones(2, dtype=torch.bfloat16), "d": torch.ones(2, dtype=torch.float64), "i": torch.ones(2).int()}
    clients = [{name: (tensor * factor).to(tensor.dtype) for name, tensor in base.items()} for factor in (2, 3, 3)]
    result, _ = run(weighted_average(), cohort(base, *clients), master=True)
    assert {name: tensor.dtype for name, tensor in result.items()} == {
        "h": torch.float32,
        "d": torch.float64,
        "i": torch.int32,
    }
    assert result["h"].tolist() == pytest.approx([1 + 1 / 6 + 2 * 2 / 6 + 2 * 3 / 6] * 2, rel=1e-6)
    rounded, _ = run(weighted_average(), cohort(base, *clients))
    assert torch.equal(rounded["h"], result["h"].to(torch.bfloat16))


def test_clients_may_send_narrower_or_wider_floats_than_the_base():
    base = {"w": torch.zeros(2)}
    clients = [{"w": torch.tensor([1.0, 2.0], dtype=dtype)} for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    result, _ = run(weighted_average(), cohort(base, *clients))
    assert result["w"].dtype == torch.float32
    assert result["w"].tolist() == [1.0, 2.0]


def test_float16_is_added_up_in_float32():
    """In float16 2048 + 1 is 2048: eight clients that each moved by 1 of 2048 would not be heard."""
    base = {"w": torch.full((4,), 2048.0, dtype=torch.float16)}
    clients = [{"w": torch.full((4,), 2050.0, dtype=torch.float16)} for _ in range(8)]
    assert run(task_arithmetic(normalize=False), cohort(base, *clients))[0]["w"].tolist() == [2064.0] * 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_tensors_can_be_merged(dtype):
    base, client = {"w": torch.tensor([0.0, 1.0]).to(dtype)}, {"w": torch.tensor([2.0, 1.0]).to(dtype)}
    result = merge(weighted_average(), base, [client, base])
    assert result["w"].dtype == dtype
    assert result["w"].float().tolist() == [1.0, 1.0]


# --- rules per name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["weighted_average", "slerp", "ties", "dare_ties", "fedgma"])
def test_an_output_of_some_clients_is_the_merge_of_these_in_their_order(name, compiled, monkeypatch, generator):
    """Tensors of other names, two clients of three, and the last one first: what counts is what is read."""
    monkeypatch.setattr(kernels, "after", lambda elements: kernels.load() if compiled else None)
    models = [torch.randn(40, 10, generator=generator) for _ in range(4)]
    some = Cohort(
        MemorySource({"w": models[0]}),
        tuple(Update(str(i), float(i + 1), MemorySource({"w": models[i + 1]})) for i in (0, 2)),
    )
    wanted, _ = run(build(name), some)
    [planned] = build(name).plan(replace(some.spec(), client_ids=("2", "0"), weights_N=(0.75, 0.25)))
    source = {-1: BASE, 0: 2, 1: 0}
    reads = tuple(Read(source[read.source], f"{read.name}{max(source[read.source], -1) + 1}") for read in planned.reads)
    everyone = Cohort(
        MemorySource({"w0": models[0]}),
        tuple(Update(str(i), 1.0, MemorySource({f"w{i + 1}": models[i + 1]})) for i in range(3)),
    )
    found, _ = run(Plan(replace(planned, reads=reads, weights_N=(0.75, 0.25))), everyone)
    # The order in which clients are added changes a last bit.
    torch.testing.assert_close(found["w"], wanted["w"], rtol=1e-6, atol=1e-6)


def test_the_shares_of_some_clients_sum_to_one():
    spec = CohortSpec({}, ("a", "b", "c"), (0.5, 0.2, 0.3), metrics_N=({"x": 1}, {"x": 2}, {"x": 3}))
    some = spec.of_clients((2, 1))
    assert some.client_ids == ("c", "b")
    assert some.weights_N == pytest.approx((0.6, 0.4))
    assert some.metrics_N == ({"x": 3}, {"x": 2})


def test_partition_takes_the_first_rule_that_matches_and_keeps_the_bases_order():
    names = ["a.norm.w", "a.mlp.w", "b.norm.bias", "head"]
    base = {name: torch.zeros(1) for name in names}
    client = {name: torch.ones(1) for name in names}
    rules = [("*.bias", task_arithmetic(scale=2.0)), ("*norm*", task_arithmetic(scale=3.0))]
    result, _ = run(partition(rules, otherwise=weighted_average()), cohort(base, client))
    assert {name: float(tensor) for name, tensor in result.items()} == dict(zip(names, [3, 1, 2, 1], strict=True))
    assert list(result) == names


def test_partition_with_a_whole_model_scope_covers_the_tensors_of_its_rule_only():
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    client = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0]), "c": torch.tensor([100.0, 200.0])}
    rules = partition([("c", weighted_average())], otherwise=ties(density=0.5, scope="model"))
    result, _ = run(rules, cohort(base, client))
    assert [result[name].tolist() for name in "abc"] == [[0, 0], [3, 4], [100, 200]]


def test_one_whole_model_method_under_two_rules_is_measured_for_each():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    client = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([30.0, 40.0])}
    method = ties(density=0.5, scope="model")
    result, _ = run(partition([("a", method)], otherwise=method), cohort(base, client))
    assert [result[name].tolist() for name in "ab"] == [[0, 2], [0, 40]]


def test_a_rule_that_gets_no_tensor_is_refused_with_the_reason():
    with pytest.raises(RecipeError) as caught:
        merge(partition([("*nrom*", ties())], weighted_average()), ONE, [TWO])
    assert str(caught.value) == "rule '*nrom*' matches no tensor of the base, which has 1 tensor: w"
    rules = [("*", ties()), ("w", slerp())]
    with pytest.raises(RecipeError) as caught:
        merge(partition(rules, weighted_average()), ONE, [TWO])
    assert str(caught.value) == ("rule 'w' gets no tensor: every one that it matches is taken by an earlier rule ('*')")


def test_partition_shows_its_rules():
    method = partition([("*norm*", weighted_average())], otherwise=task_arithmetic(scale=0.5))
    assert str(method) == (
        "partition(*norm*: weighted_average(), otherwise task_arithmetic(scale=0.5, coefficients=None, normalize=True))"
    )


# --- what goes wrong -------------------------------------------------------------------------------------------------


def failing(method, a_cohort, **options):
    """The error, after which the sink has been aborted if it had begun, and never finished."""
    sink = WatchedSink()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller looks at it)
        execute(method, a_cohort, sink, **options)
    assert sink.events in ([], ["abort"], ["begin", "abort"])
    assert sink.tensors == {}
    return caught.value


def test_nothing_to_merge():
    error = failing(weighted_average(), Cohort(MemorySource(ONE), ()))
    assert isinstance(error, MergeError)
    assert str(error) == "there is nothing to merge: the cohort has no update"


def test_two_outputs_with_one_name():
    output = Output("w", VECTOR, READS, Whole(lambda base, client: client))
    error = failing(Plan(output, Output("v", VECTOR, READS, output.compute), output), cohort(ONE, TWO))
    assert isinstance(error, MergeError)
    assert str(error) == "two outputs have the name 'w'"


def test_an_output_of_another_shape_than_planned():
    output = Output("w", TensorSpec((3,), torch.float32), READS, Whole(lambda base, client: client))
    error = failing(Plan(output), cohort(ONE, TWO))
    assert isinstance(error, MergeError)
    assert str(error) == "tensor 'w': computed shape (2,), planned (3,)"


def test_a_computation_that_nobody_knows():
    error = failing(Plan(Output("w", VECTOR, READS, object())), cohort(ONE, TWO))
    assert isinstance(error, MergeError)
    assert str(error) == "tensor 'w': the executor does not know how to run a object"


@pytest.mark.parametrize(
    ("dtype", "scale", "wanted"),
    [
        (torch.float16, 5e4, "a merged value of magnitude 100000 does not fit float16"),
        (torch.float32, 1e39, "a merged value of magnitude inf does not fit float32"),
        (torch.bfloat16, 1e39, "a merged value of magnitude inf does not fit bfloat16"),
    ],
)
def test_a_merged_value_that_does_not_fit(dtype, scale, wanted):
    base, client = {"w": torch.zeros(2, dtype=dtype)}, {"w": torch.full((2,), 2.0, dtype=dtype)}
    error = failing(task_arithmetic(scale=scale), cohort(base, client))
    assert isinstance(error, MergeError)
    assert str(error) == f"tensor 'w': {wanted}; lower the method's scale"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_in_one_slice_stops_the_merge_and_aborts_the_sink(threads):
    calls = []

    def combine(deltas_NS, weights_N, at):
        calls.append(at.start)
        if at.start == 32768:
            raise ZeroDivisionError("in the third slice")
        return deltas_NS[0]

    big = {"w": torch.zeros(64 * 16384)}
    error = failing(Coordinate(combine), cohort(big, big), threads=threads, slice_elements=16384)
    assert isinstance(error, ZeroDivisionError)
    assert 32768 in calls


def test_a_sink_that_fails_is_aborted():
    class FullDisk(WatchedSink):
        def write(self, name, start, values_S):
            raise OSError(28, "No space left on device")

        def place(self, name):
            return None

    sink = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        execute(weighted_average(), cohort(ONE, TWO), sink)
    assert sink.events == ["begin", "abort"]


def test_a_device_that_torch_does_not_have_here():
    sink = WatchedSink()
    for device in ("tpu", "cuda:99"):
        with pytest.raises(RecipeError, match=f"^device: found '{device}', wanted one that torch has here"):
            execute(weighted_average(), cohort(ONE, TWO), sink, device=device)
    assert sink.events == []


# --- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_says_who_how_much_and_how_long():
    base = {"w": torch.zeros(10), "i": torch.zeros(3, dtype=torch.int64), "h": torch.zeros(4, dtype=torch.bfloat16)}
    _, report = run(weighted_average(), cohort(base, base, base))
    assert (report.clients, report.weights, report.tensors) == (("0", "1"), (1 / 3, 2 / 3), 3)
    assert report.bytes_read == 3 * (40 + 8) + 24  # integers are read from the base only
    assert report.bytes_written == 40 + 8 + 24
    assert 0 < report.seconds < 10


def test_on_tensor_is_told_once_a_tensor_when_all_its_slices_are_written():
    names = {"big": torch.zeros(10 * 16384), "small": torch.zeros(3), "int": torch.zeros(2, dtype=torch.int64)}
    written, told, lock = [], [], threading.Lock()
    release_first = threading.Event()

    def combine(deltas_NS, weights_N, at):
        if at.tensor == "big" and at.start == 0:
            release_first.wait(5)  # the first slice is done last
        with lock:
            written.append((at.tensor, at.start))
            if len([1 for name, _ in written if name == "big"]) == 9:
                release_first.set()
        return deltas_NS[0]

    def on_tensor(name):
        with lock:
            told.append((name, len([1 for other, _ in written if other == name])))

    run(Coordinate(combine), cohort(names, names), threads=2, slice_elements=16384, on_tensor=on_tensor)
    assert sorted(told) == [("big", 10), ("int", 0), ("small", 1)]


# --- planning without a cohort ---------------------------------------------------------------------------------------


def test_merged_specs_plans_without_any_tensor():
    base = {"w": TensorSpec((10**6, 10**6), torch.bfloat16), "i": TensorSpec((), torch.int64)}
    assert merged_specs(ties(), base) == base
    with pytest.raises(RecipeError, match=r"rule 'x' matches no tensor"):
        merged_specs(partition([("x", ties())], ties()), base)


def test_merged_specs_cannot_tell_what_only_real_clients_decide():
    assert merged_specs(task_arithmetic(coefficients={"1017": -1.0}), {"w": VECTOR}) is None


def test_clients_are_sorted_by_number_and_then_by_text():
    ids = ["b", "10", "9", "a", "0010", "-1"]
    updates = tuple(Update(client_id, 1.0, MemorySource(ONE)) for client_id in ids)
    ordered = [update.client_id for update in Cohort(MemorySource(ONE), updates).updates]
    assert ordered == ["9", "0010", "10", "-1", "a", "b"]


def test_shares_sum_to_one():
    updates = tuple(Update(str(i), examples, MemorySource(ONE)) for i, examples in enumerate([1, 3, 1e9, 0.1]))
    weights_N = Cohort(MemorySource(ONE), updates).weights_N
    assert sum(weights_N) == pytest.approx(1.0, abs=1e-15)
    assert weights_N[1] == pytest.approx(3 * weights_N[0])


# --- plans that do not hold ------------------------------------------------------------------------------------------


F32 = TensorSpec((3,), torch.float32)
AVERAGE = WeightedSum(1.0, (0.5, 0.5))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Output("a", F32, (Read(BASE, "a"), Read(0, "nope")), AVERAGE), "'nope' of client '0', which is not there"),
        (Output("a", F32, (Read(BASE, "nope"), Read(0, "a")), AVERAGE), "'nope' of the base, which is not there"),
        (Output("a", F32, (Read(BASE, "a"), Read(7, "a")), AVERAGE), "'a' of source 7, which is not there"),
        (Output("a", F32, (Read(0, "a"),), AVERAGE), "without the base"),
        (Output("a", F32, (Read(BASE, "a"), Read(0, "b")), AVERAGE), "with 5 elements, wanted 3"),
    ],
)
def test_a_plan_that_reads_what_it_cannot_is_refused(output, message):
    base = {"a": torch.zeros(3), "b": torch.zeros(5)}
    error = failing(Plan(output), cohort(base, base))
    assert isinstance(error, MergeError)
    assert message in str(error)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_source_that_gives_another_tensor_than_it_described_is_refused(loaded):
    class Short(MemorySource):
        def read(self, name):
            return super().read(name)[:2]

    before = kernels._tried, kernels._module
    try:
        kernels._tried, kernels._module = True, kernels.load() if loaded else None
        base = {"a": torch.zeros(3)}
        wrong = Cohort(MemorySource(base), (Update("0", 1.0, Short(base)),))
        error = failing(weighted_average(), wrong)
    finally:
        kernels._tried, kernels._module = before
    assert isinstance(error, MergeError)
    assert "2 elements were read, wanted 3" in str(error)


def test_large_outputs_are_not_all_prepared_before_any_is_filled():
    """Each holds what it was prepared with: here a copy that a source makes when it is read."""
    alive, most = set(), 0

    class Copying(MemorySource):
        def read(self, name):
            nonlocal most
            tensor = super().read(name).clone()
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            most = max(most, len(alive))
            return tensor

    base = {f"{number}": torch.zeros(4 * 16384) for number in range(40)}
    many = Cohort(MemorySource(base), (Update("0", 1.0, Copying(base)),))
    execute(weighted_average(), many, MemorySink(), threads=1, slice_elements=16384)
    assert most <= 6


def test_threads_wait_as_long_for_one_another_after_a_merge_as_before():
    before = sys.getswitchinterval()
    with worker_pool(1):
        assert sys.getswitchinterval() == SWITCH_SECONDS
        with worker_pool(2):
            assert sys.getswitchinterval() == SWITCH_SECONDS
        assert sys.getswitchinterval() == SWITCH_SECONDS
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("whole_bytes", [0, 1000, 1 << 24])
def test_written_whole_or_through_the_mapping_the_bytes_are_the_same(tmp_path, whole_bytes):
    draw = torch.Generator().manual_seed(0)
    base = {f"w{size}": torch.randn(size, generator=draw) for size in (0, 1, 250, 251, 40_000)}
    update = {name: tensor + torch.randn(tensor.shape, generator=draw) for name, tensor in base.items()}
    cohort = Cohort(MemorySource(base), (Update("a", 1.0, MemorySource(update)),))
    memory, sink = MemorySink(), SafetensorsSink(tmp_path)
    sink.whole_bytes = whole_bytes
    execute(weighted_average(), cohort, memory)
    execute(weighted_average(), cohort, sink, threads=2, slice_elements=16_384)
    found = load(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in memory.tensors.items())
