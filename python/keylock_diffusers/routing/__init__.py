"""What a batch carries: rows, and the tensors that layers ask for."""
