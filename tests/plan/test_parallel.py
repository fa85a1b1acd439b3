"Training on many devices: bytes, memory and time against figures worked out by hand."

from medft.core.files import MedftError
from medft.core.recipe import batch_of_ranks, load_recipe
from medft.plan import estimate, parallel
from medft.plan.devices import Device, device_named

import pytest

GPU = Device("H100 80GB", 80e9, 1e15, 3e12, True)
T = dict(
    trained=8e9,
    weights=16e9,
    quantised=0,
    parameters=4e9,
    bytes_per_weight=4,
    share_trained=0.5,
    width=2,
    layers=10,
    largest=1e8,
    outside=1e8,
)
PARTS = dict(weights=16e9, gradients=8e9, optimizer=16e9, activations=5e9, peak=45e9)


@pytest.mark.parametrize(
    "strategy, once, four",
    # N = 4, P b = 8, W = 16: 2 x 3/4 x 8; 3/4 (a + 1) 8; 3/4 (2 a 16 + 8); 3/4 (2 a 16 + a 8)
    [("ddp", 12, 12), ("zero2", 12, 30), ("fsdp", 30, 102), ("zero3", 30, 120)],
)
def test_bytes_are_those_of_the_ring(strategy, once, four):
    assert parallel.bytes_per_step(strategy, 4, 8, 16, 1) == once
    assert parallel.bytes_per_step(strategy, 4, 8, 16, 4) == four
    assert parallel.bytes_per_step(strategy, 1, 8, 16, 4) == 0


def test_an_unknown_strategy_is_refused():
    with pytest.raises(MedftError, match="known: ddp, zero2, fsdp, zero3"):
        parallel.bytes_per_step("fdsp", 2, 1)


def test_memory_by_hand_and_its_limit():
    held = {s: parallel.memory_of_rank(PARTS, s, 8, T) for s in parallel.STRATEGIES}
    assert held["ddp"]["peak"] == 45e9 + 8e9  # and the buckets
    assert held["zero2"]["peak"] == 16e9 + 1e9 + 2e9 + 5e9 + 2 * 5e8 * 2
    # two layers of 1e8 parameters with 4 bytes of weight and half a gradient of 4; the outside
    assert held["fsdp"]["peak"] == 2e9 + 1e9 + 2e9 + 5e9 + 2 * 1e8 * 6 + 4e8
    assert held["zero3"]["peak"] == 2e9 + 1e9 + 2e9 + 5e9 + 1e9 * 4 + 5e8 * 2
    assert parallel.memory_of_rank(PARTS, "fsdp", 8, T, 2)["gradients"] == 8e9
    peaks = [parallel.memory_of_rank(PARTS, "zero3", n, T)["peak"] for n in (8, 64, 1 << 20)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] == pytest.approx(5e9 + 5e9, rel=1e-3)  # activations and buffers are left
    assert parallel.memory_of_rank(PARTS, "zero3", 1, T)["peak"] == 45e9


def test_quantised_weights_stay_whole():
    held = parallel.memory_of_rank(PARTS, "fsdp", 8, T | dict(quantised=8e9))
    assert held["weights"] == 8e9 + 1e9


def test_time_by_hand():
    # 12 bytes over 24 a second, computing 3 s: hidden in the backward pass, 2/3 of it
    t = T | dict(trained=8, weights=16)
    found = parallel.seconds_of_step("ddp", 4, t, 3.0, 1, 24)
    assert found["sending"] == pytest.approx(0.5, abs=1e-4)
    assert found["efficiency_range"] == pytest.approx([3 / 3.5, 1], abs=1e-4)
    assert found["seconds"] == pytest.approx(3.25, abs=1e-4)


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
@pytest.mark.parametrize("ranks", [1, 2, 64, 1024])
def test_efficiency_is_a_share(strategy, ranks):
    for bandwidth in (1e9, 4e11):
        found = parallel.seconds_of_step(strategy, ranks, T, 1.0, 2, bandwidth, 0.9)
        low, high = found["efficiency_range"]
        assert 0 < low <= found["efficiency"] <= high <= 1
    assert parallel.seconds_sending(strategy, 1, T, 2, 1e9) == 0


def test_ranks_wait_for_the_longest_rows():
    spread = [10, 20, 40, 80, 400]
    shares = [parallel.waiting(spread, 1, 1, n) for n in (1, 2, 8)]
    assert shares[0] == 1 > shares[1] > shares[2] > 0
    assert parallel.waiting([64, 64], 2, 2, 8) == parallel.waiting(None, 2, 2, 8) == 1


@pytest.mark.parametrize(
    "text, found", [("25GB/s", 25e9), ("200Gb/s", 25e9), ("100 Gbit/s", 12.5e9), ("5MB/s", 5e6)]
)
def test_bandwidths_are_read(text, found):
    assert parallel.read_bandwidth(text) == found


@pytest.mark.parametrize("text", ["25", "25GB", "fast", "0GB/s", "-1GB/s", "1.2.3GB/s", ""])
def test_what_is_no_bandwidth_is_refused_in_one_line(text):
    with pytest.raises(MedftError, match="^link: .* with its unit") as e:
        parallel.read_bandwidth(text)
    assert "\n" not in str(e.value)


def test_the_slowest_link_counts_and_is_named():
    h100 = device_named("H100 80GB")
    assert parallel.link_between(h100).bandwidth == 360e9
    assert parallel.link_between(h100, 2).bandwidth == 12.5e9
    assert "assumed" in parallel.link_between(h100, 2).basis
    assert parallel.link_between(h100, 2, "25GB/s").bandwidth == 25e9
    assert parallel.link_between(h100, 2, "25GB/s", "50GB/s").bandwidth == 25e9
    assert parallel.link_between(h100, 1, None, "1GB/s").bandwidth == 360e9


@pytest.mark.parametrize(
    "micro, accumulation, ranks, found",
    [
        (1, 16, 8, (1, 2, 16, True)),
        (8, 1, 8, (1, 1, 8, True)),
        (4, 6, 8, (3, 1, 24, True)),
        (4, 3, 8, (4, 1, 32, False)),
    ],
)
def test_the_batch_is_the_recipes(micro, accumulation, ranks, found):
    batch = batch_of_ranks(micro, accumulation, ranks)
    keys = ("micro", "accumulation", "effective", "keeps")
    assert tuple(batch[key] for key in keys) == found
    assert batch["micro"] * batch["accumulation"] * ranks == batch["effective"]
    assert bool(batch["set"]) == (accumulation % ranks != 0)


def test_advice_is_the_fastest_that_fits_and_the_simplest_of_equals():
    def found(**changes):
        usual = dict(fits=True, refused=None, efficiency=0.9, ranks=8)
        usual["memory_bytes"] = dict(peak=9e9)
        return {s: usual | changes.get(s, {}) for s in parallel.STRATEGIES}

    assert parallel.advised_strategy(found())[0] == "ddp"
    assert parallel.advised_strategy(found(zero2=dict(efficiency=0.91)))[0] == "ddp"
    name, why = parallel.advised_strategy(found(ddp=dict(fits=False)))
    assert name == "zero2" and "ddp would not fit" in why
    assert parallel.advised_strategy(found(fsdp=dict(efficiency=0.99)))[0] == "fsdp"
    none = {s: dict(fits=False) for s in parallel.STRATEGIES}
    name, why = parallel.advised_strategy(found(**none))
    assert name is None and "none fits" in why
    none["fsdp"] = dict(refused="because")
    assert "refuses it: because" in parallel.advised_strategy(found(**none))[1]


def test_what_medft_does_not_train_has_a_reason():
    lora = load_recipe("llama31_8b_qlora", ["quantization=null"])
    qlora = load_recipe("llama31_8b_qlora")
    assert parallel.strategy_refusal(lora, "fsdp", "trl", True) is None
    assert "GPU" in parallel.strategy_refusal(qlora, "fsdp", "trl", True)
    assert parallel.strategy_refusal(qlora, "zero2", "trl", True) is None
    assert "processor" in parallel.strategy_refusal(lora, "zero2", "trl", False)
    assert "ddp only" in parallel.strategy_refusal(lora, "zero2", "fast", True)


def test_proposals_are_written_as_recipes_are():
    lora = load_recipe("llama31_8b_qlora", ["quantization=null"])
    proposed = list(estimate._sharding_proposals(lora, [], 1))
    assert [p.lines for p in proposed[:2]] == [
        ["scale.strategy=zero2", "scale.processes=2"],
        ["scale.strategy=fsdp", "scale.processes=2"],
    ]
    for proposal in proposed:
        estimate.with_overrides(lora, proposal.lines)
    qlora = load_recipe("llama31_8b_qlora")
    strategies = {p.lines[0] for p in estimate._sharding_proposals(qlora, [], 1)}
    assert strategies == {"scale.strategy=zero2"}
    assert estimate.batch_of(lora, 8)["effective"] == 16
