"""Errors that a user can mend: each message says what was expected and what came.

The command line prints the message of any `LostregError` as one line and exits with code 2.
"""


class LostregError(Exception):
    """Base of every error that lostreg raises about its input."""


class OptionError(LostregError, ValueError):
    """An option or argument is outside its range, or two of them contradict each other."""


class BackboneError(LostregError):
    """The backbone is unknown, unsupported, or its weights cannot be had."""


class WeightsError(BackboneError):
    """A weights file cannot be read or does not fit the backbone."""


class ImageError(LostregError):
    """An image file cannot be read, or is larger than allowed."""


class ImageUnavailableError(ImageError):
    """An image could not be had this time: its file was not there or could not be opened, or memory ran out.

    Nothing is said of its pixels: another try may read it.
    """


class DatasetError(LostregError):
    """A benchmark's folder or annotations are missing, incomplete or malformed."""


class PredictionsError(LostregError):
    """A predictions file or output folder cannot be used."""


class CalibrationError(LostregError):
    """A bias file cannot be written or read, or nothing could be calibrated."""


class RegistersError(LostregError):
    """A registers file cannot be written or read, or there is nothing that test-time registers could take up."""


class LostregWarning(UserWarning):
    """Something that a user should know of, though the work goes on."""
