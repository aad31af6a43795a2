"""The loss along one step: by probes ahead, by looking back, or by differentiation."""
