"""Which of several replicas of a model a request is sent to."""
