"""Stand-ins for the outside world, for the tests of whoever builds on ENG."""
