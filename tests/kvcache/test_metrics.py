"""The table of stats, what it becomes for Prometheus, and the page that explains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcache import metrics_stats
from kvcache.metrics import HttpMetrics, document, unknown_names
from kvcache.metrics_route import RouteMetrics
from kvcache.metrics_stats import STATS, Stat

ROOT = Path(__file__).parents[2]


def shown(page: HttpMetrics) -> dict[tuple[str, ...], float]:
    """Every sample on the page: its name, then its label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.render().decode())
        for sample in family.samples
    }


def test_the_page_in_docs_is_the_table() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == document(), "python -m kvcache.metrics > docs/metrics.md"


@pytest.mark.parametrize("stat", STATS, ids=lambda stat: stat.name)
def test_names_follow_the_conventions(stat: Stat) -> None:
    assert re.fullmatch(r"kvcache_[a-z]+(_[a-z]+)*", stat.metric)
    assert stat.kind in ("counter", "gauge")
    assert stat.metric.endswith("_total") == (stat.kind == "counter")
    assert not re.search(r"_(ms|ns|us|kib|mib|kb|mb)(_total)?$", stat.metric), "base units only"
    assert stat.help.endswith(".") and (bool(stat.label) == bool(stat.values) or stat.is_open)
    assert len(stat.values) <= 32, "every label value is a series on every node"


def test_no_label_can_hold_what_a_client_chose() -> None:
    allowed = {"request", "code", "path", "reason", "state", "tier", "answer"}
    assert {stat.label for stat in STATS if stat.label and not stat.is_open} <= allowed
    assert {stat.label for stat in STATS if stat.is_open} == {"cache"}, "the operator's settings name these"
    assert len({stat.name for stat in STATS}) == len(STATS)


def test_what_the_settings_name_is_shown_as_it_is_named() -> None:
    page = HttpMetrics()
    sent = {"shadow_hit_ratio:leaf-lru@50%": 0.25, "shadow_hit_ratio:mine+keep@100%": 0.5}
    page.node.update(sent)
    samples = shown(page)
    assert samples["kvcache_shadow_hit_ratio", "leaf-lru@50%"] == 0.25
    assert samples["kvcache_shadow_hit_ratio", "mine+keep@100%"] == 0.5
    assert unknown_names([*sent, "shadow_hit_ratios:x"]) == ["shadow_hit_ratios:x"]


def test_each_stat_is_shown_with_its_label() -> None:
    page = HttpMetrics()
    page.node.update({"requests:lease": 3.0, "used_bytes:host": 4096.0, "hit_tokens": 7.0})
    samples = shown(page)
    assert samples["kvcache_requests_total", "lease"] == 3
    assert samples["kvcache_requests_total", "open"] == 0, "what was not counted yet is 0, not absent"
    assert samples["kvcache_used_bytes", "host"] == 4096
    assert samples["kvcache_hit_tokens_total",] == 7


def test_a_label_value_that_is_not_in_the_table_is_shown_as_other() -> None:
    page = HttpMetrics()
    page.node.update(
        {"removed_blocks:tenant-x": 2.0, "removed_blocks:secret": 3.0, "removed_blocks:evicted": 1.0}
    )
    samples = shown(page)
    assert samples["kvcache_removed_blocks_total", "other"] == 5
    assert samples["kvcache_removed_blocks_total", "evicted"] == 1
    assert "secret" not in page.render().decode()


def test_a_name_that_is_not_in_the_table_is_named() -> None:
    values = {"hit_tokens": 1.0, "requests:lease": 1.0, "requests:dance": 1.0, "surprise": 1.0}
    assert unknown_names(values) == ["requests:dance", "surprise"]


def test_nothing_of_the_node_is_shown_before_the_node_has_spoken() -> None:
    page = HttpMetrics()
    assert "kvcache_hit_tokens" not in page.render().decode()
    assert "kvcache_build_info" in page.render().decode()


def test_nothing_is_shown_that_the_page_in_docs_does_not_tell_of() -> None:
    """When a counter was made is a series of its own, unless that is switched off."""
    metrics, route = HttpMetrics(), RouteMetrics()
    metrics.index_resyncs.labels("gap").inc()
    route.choices.labels("cheapest").inc()
    assert "_created" not in (metrics.render() + route.render()).decode()


def test_two_pages_do_not_share_numbers() -> None:
    first, second = HttpMetrics(), HttpMetrics()
    first.answered("/healthz", 200, 0.001)
    assert ("kvcache_http_requests_total", "/healthz", "200") in shown(first)
    assert ("kvcache_http_requests_total", "/healthz", "200") not in shown(second)


def test_every_request_of_the_protocol_is_counted() -> None:
    assert {"hello", "open", "match", "lease", "watch"} <= set(metrics_stats.REQUESTS)


@pytest.mark.parametrize("page", ["nvme.md", "hit-ratio.md"])
def test_alerts_are_about_metrics_that_there_are(page: str) -> None:
    """Also that none asks for a value which its label never has."""
    docs = Path(__file__).parents[2] / "docs"
    listed = (docs / "metrics.md").read_text()
    wanted = re.findall(r"(?<!:)(kvcache_[a-z_]+)(?:\{(\w+)!?=~?\"([^\"]*)\"\})?", (docs / page).read_text())
    assert len(wanted) >= 8
    for name, label, values in wanted:
        assert f"| `{name}` |" in listed
        if label:
            (row,) = re.findall(rf"\| `{name}` \| {label} \| (.*) \|", listed)
            assert set(values.split("|")) <= set(row.split(", "))
