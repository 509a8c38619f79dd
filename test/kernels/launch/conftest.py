from fake_cuda import fake, fake_driver  # noqa: F401  (fixtures)
