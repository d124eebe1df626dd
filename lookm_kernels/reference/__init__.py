"""Pure torch: the specification of every op, memory-bounded, and what runs where no faster backend is there."""
