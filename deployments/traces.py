"""OpenTelemetry traces, as an option: to a collector, by OTLP over HTTP."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE = "tandem"
PATH = "/v1/traces"  # as OTLP says, below what is configured


def check_traces() -> None:
    """Raises `UsageError` where what sends traces is not installed."""
    if importlib.util.find_spec("opentelemetry.exporter.otlp") is None:
        raise UsageError("traces_to needs opentelemetry-exporter-otlp-proto-http: pip install 'tandem[traces]'")


def traces_to(url: str) -> TracerProvider:
    """What sends spans to the collector at `url`, such as http://collector:4318, in batches, from a thread of its own.

    A collector that does not answer costs spans, and no request.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url.rstrip("/") + PATH)))
    return provider
