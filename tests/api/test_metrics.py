"""/metrics: names, bounded labels, and numbers that agree with what happened."""

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.serving.energy import GpuMeter
from app.serving.metrics import RequestMetrics
from tests.api.serve import client_of, run
from tests.fake_engine import FakeEngine, says

URL = "/v1/completions"
# What vLLM's own boards and the Kubernetes inference gateway ask for.
NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    'vllm:cache_config_info{block_size="16",model_name="fake",num_gpu_blocks="64"} 1.0',
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:admission_rejections_total",
    "vllm:iteration_tokens_total_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_params_max_tokens_bucket",
    "process_start_time_seconds",
]


def samples_of(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def total(page: str, name: str, **labels: str) -> float:
    wanted = labels.items()
    return sum(
        value
        for (each, own), value in samples_of(page).items()
        if each == name and wanted <= dict(own).items()
    )


async def page_after(*bodies: dict, text: str = "abcd", **options) -> str:
    async with client_of(FakeEngine(says(text)), **options) as client:
        for body in bodies:
            await client.post(URL, json=body)
        return (await client.get("/metrics")).text


def test_every_name_is_there_before_the_first_request():
    async def scenario():
        page = await page_after()
        missing = [name for name in NAMES if not re.search(f"^{re.escape(name)}", page, re.M)]
        assert missing == []

    run(scenario())


def test_numbers_agree_with_the_requests():
    async def scenario():
        page = await page_after({"prompt": "ab", "n": 2}, {"prompt": "xyz", "max_tokens": 2})
        assert total(page, "vllm:prompt_tokens_total") == 7
        assert total(page, "vllm:generation_tokens_total") == 12  # with the ends of text
        assert total(page, "vllm:request_success_total", finished_reason="stop") == 2
        assert total(page, "vllm:request_success_total", finished_reason="length") == 1
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert total(page, f"vllm:{name}_seconds_count") == 3
        assert total(page, "vllm:inter_token_latency_seconds_count") == 9
        assert total(page, "vllm:request_generation_tokens_sum") == 12
        assert total(page, "vllm:request_params_n_sum") == 3

    run(scenario())


def test_errors_are_counted_by_code():
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine, api_keys=("secret",)) as client:
            key = {"authorization": "Bearer secret"}
            await client.post(URL, json={"prompt": "a"})
            await client.post(URL, json={"prompt": "a", "n": 0}, headers=key)
            await client.post(URL, json={"prompt": "a", "model": "other"}, headers=key)
            await client.get("/nowhere", headers=key)
            engine.error = "broken"
            await client.post(URL, json={"prompt": "a"}, headers=key)
            engine.is_draining = True
            await client.post(URL, json={"prompt": "a"}, headers=key)
            page = (await client.get("/metrics", headers=key)).text
        for code in (
            *("invalid_api_key", "invalid_request_error", "model_not_found", "not_found"),
            *("engine_error", "shutting_down"),
        ):
            assert total(page, "arriero:request_errors_total", code=code) == 1, code
        assert total(page, "arriero:ready") == 0

    run(scenario())


def test_no_label_is_made_by_a_client():
    async def scenario():
        bodies = [{"prompt": "a", "model": f"made-up-{number}"} for number in range(5)]
        page = await page_after(*bodies)
        assert "made-up" not in page
        names = {name for _, labels in samples_of(page) for name, _ in labels}
        assert names <= {
            *("model_name", "le", "finished_reason", "reason", "code"),
            *("block_size", "num_gpu_blocks"),
        }

    run(scenario())


def test_buckets_are_cumulative_and_end_with_the_count():
    metrics = RequestMetrics("fake", FakeEngine(says("x")))
    for seconds in (0.001, 0.0011, 3, 1e9):
        metrics.observe("time_to_first_token_seconds", seconds)
    page = metrics.render().decode()
    name = "vllm:time_to_first_token_seconds"
    assert total(page, f"{name}_bucket", le="0.001") == 1  # a bound belongs below itself
    assert total(page, f"{name}_bucket", le="0.005") == 2
    assert total(page, f"{name}_bucket", le="+Inf") == total(page, f"{name}_count") == 4
    assert total(page, f"{name}_sum") == pytest.approx(1e9 + 3.0021)


class Nvml:
    """Two GPUs, the second too old to tell its energy."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle:
            raise self.NVMLError
        return 12_500  # millijoules

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 70_000 + handle

    def nvmlDeviceGetMemoryInfo(self, handle: int):
        return type("Memory", (), {"used": 1 << 30})

    def nvmlDeviceGetUtilizationRates(self, handle: int):
        return type("Rates", (), {"gpu": 50})


def test_gpus_tell_their_energy_where_they_can():
    page = RequestMetrics("fake", FakeEngine(says("x")), GpuMeter(Nvml())).render().decode()
    assert total(page, "arriero:gpu_energy_joules_total", gpu="0") == 12.5
    assert 'arriero:gpu_energy_joules_total{gpu="1"}' not in page
    assert total(page, "arriero:gpu_power_watts") == pytest.approx(140.001)
    assert total(page, "arriero:gpu_busy", gpu="1") == 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_client_that_goes_away_count_as_aborted_once(stream):
    async def scenario():
        engine = FakeEngine(says("abc"))
        engine.gate.clear()
        async with client_of(engine) as client:
            body = {"prompt": "a", "n": 2, "stream": stream}
            post = asyncio.ensure_future(client.post(URL, json=body))
            while not engine.requests:
                await asyncio.sleep(0)
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)
            engine.gate.set()
            await client.post(URL, json={"prompt": "a", "n": 2, "stream": stream})
            page = (await client.get("/metrics")).text
        ends = "vllm:request_success_total"
        assert total(page, ends, finished_reason="abort") == 2
        assert total(page, ends, finished_reason="stop") == 2
        assert total(page, "vllm:e2e_request_latency_seconds_count") == 4

    run(scenario())
