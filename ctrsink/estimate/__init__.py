"""What a run takes of machines, told before it is started; training asks the same functions how much fits."""
