"""What a way of routing is worth: traces replayed over simulated workers, one router beside the other.

    workload ──requests──► router ──► worker: queue, prefill, decode, cache ──► first tokens, hits
                             ▲                          │ stored, removed
                             └── index ◄── feed ◄───────┘  late, lossy, interrupted as asked for

The model of a worker is in ``service``; what it leaves out is in docs/routing-simulation.md.
"""
