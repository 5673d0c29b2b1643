"""CurveBall in trainers that call backward() themselves. Each module needs the package that it is named after.

Trainers that hand a closure on need nothing from here: Accelerate, Fabric, Ignite, and Lightning's manual optimization.
"""
