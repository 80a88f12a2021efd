"""Where a request goes: what each worker would cost, and which one is chosen. Pure: no I/O, no clock."""
