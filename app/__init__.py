"""The service around the model: policy, text, protocol, use cases, HTTP."""
