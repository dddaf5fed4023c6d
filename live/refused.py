class Refused(Exception):
    """A request that can't be met. `status` is the HTTP status that says so; the message is for whoever asked."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
