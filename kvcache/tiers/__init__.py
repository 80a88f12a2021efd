"""The tiers: places where blocks lie. Slots and bytes, nothing else."""
