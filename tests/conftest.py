"""Settings of hypothesis for all tests: what a test finds must not depend on how busy the machine is."""

from hypothesis import HealthCheck, settings

settings.register_profile("layerwise", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("layerwise")
