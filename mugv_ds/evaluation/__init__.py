"""What came out of a model: measures of its videos, and the benchmarks that judge them."""
