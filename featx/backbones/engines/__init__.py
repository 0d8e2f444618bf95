"""Engines: how a frozen network is run, by torch or by OpenVINO."""
