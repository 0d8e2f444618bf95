"""Runners: the parts of one extraction done by processes on this machine, or by a Ray cluster."""
