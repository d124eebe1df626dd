"""Where the pairs of one layer lie: in tensors that grow or in buffers of a fixed size; one file each."""
