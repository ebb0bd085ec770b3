"""The numerical tests as other CPUs would compute them."""
