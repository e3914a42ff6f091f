"""Keys of a run's config that may change while it stays the same run."""

HARMLESS = frozenset(
    {
        *(
            "data.root",
            "data.download",
            "data.num_workers",
            "data.check",
            "train.eval_batch_size",
            "train.grad_accum_steps",
        ),
        *("train.checkpoint_epochs", "train.checkpoint_steps", "train.checkpoint_hist", "train.log_interval"),
        *("train.log_ranks", "train.trackers", "train.timeout_minutes", "train.latency_batch_size"),
    }
)
"""They change nothing that a run computes beyond rounding."""
