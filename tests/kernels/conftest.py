"""Carries the ops to the device that GROK_TEST_DEVICE names, before a test module looks for them."""

from __future__ import annotations

from tests.kernels import on_device

if not on_device.ON_CPU:
    on_device.install()
