"""`tandem serve` with its model on a simulated accelerator: for `benchmarks/online.py`.

    STRETCH=10 python benchmarks/online_own.py PORT MODEL

All but the forward pass of the network is what `tandem serve` runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from deployments.cluster import own_ray


def main(port: int, model: str, stretch: float) -> None:
    own_ray()
    import deployments.pool
    from deployments.config import Config, PoolConfig
    from jobs.screen import Screen
    from jobs.serving import serve_here

    class SimulatedReplica(deployments.pool.ModelReplica):
        """It travels to the replicas by value, as it is not at the top of a module."""

        def _load(self, model: str, config: PoolConfig) -> None:
            import pipeline.model
            from benchmarks.accelerator import simulate

            load = pipeline.model._load

            def load_simulated(*arguments: object) -> object:
                processor, network = load(*arguments)  # type: ignore[arg-type]
                simulate(network, stretch)
                return processor, network

            pipeline.model._load = load_simulated  # type: ignore[assignment]
            super()._load(model, config)

    deployments.pool.ModelReplica = SimulatedReplica  # type: ignore[misc]
    serve_here(Screen(sys.stdout, sys.stderr, as_json=False), model, "127.0.0.1", port, Config())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(os.environ["STRETCH"]))
