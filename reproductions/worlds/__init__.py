"""Test beds that reproductions share: worlds small enough for every expectation to be a sum."""
