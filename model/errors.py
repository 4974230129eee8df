"""What can go wrong below the seam, torch-free, so that every floor may name it.

ModelError
├── ConfigError       a config, header or option that no model can be built from
├── WeightsError      missing, truncated, misshapen or forbidden weight files
├── TokenizerError    a tokenizer file that is missing or does not fit the model
└── ResourceError     the model or its K/V pool does not fit the device

Each message is one line that says what is wrong and where (the file, the field).
"""


class ModelError(Exception):
    """Refuse a model: the message is one line that names the culprit and the place."""


class ConfigError(ModelError):
    """Raised for a config, a header or a load option that no model can be built from."""


class WeightsError(ModelError):
    """Raised for weight files that are missing, truncated, misshapen or forbidden."""


class TokenizerError(ModelError):
    """Raised for a tokenizer that is missing, broken or does not fit the model."""


class ResourceError(ModelError):
    """Raised when weights or K/V pool cannot fit the memory they may use."""
