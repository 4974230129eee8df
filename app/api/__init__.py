"""HTTP: routes, middleware, errors, server-sent events. Knows nothing of scheduling or tensors."""
