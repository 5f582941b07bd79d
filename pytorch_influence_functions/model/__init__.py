"""What is differentiated? A model and a loss as functions of a vector of parameters, their gradients and curvature."""
