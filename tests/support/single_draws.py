"""What stands at one position of a mixture, by the scalar formula of a source's shuffle: slow, and
independent of the arrays of `owlfuse.data.mixture.shuffle`."""

STEP = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def look_up(mixture, position):
    """Returns the source's name and the sample's index in it, at a position from 0."""
    mixture.check_range(position, position + 1)
    source = int(mixture.schedule.sources(position, position + 1)[0])
    draw = int(mixture.schedule.counts_before(position)[source])
    name = mixture.names[source]
    return name, sample_at(mixture.shuffles[name], draw)


def sample_at(shuffle, draw):
    """Returns the sample at a draw from 0 of a shuffle."""
    epoch, cell = divmod(draw, shuffle.size)
    keys = []
    for number in range(4):
        keys.append(mixed(shuffle.key + (epoch * 4 + number) * STEP & MASK) >> 32)
    while True:
        row, column = divmod(cell, shuffle.columns)
        for number in range(shuffle.rounds):
            if number % 2:
                shift = reduced(hashed(row, keys[number]), shuffle.columns)
                column = (column + shift) % shuffle.columns
            else:
                shift = reduced(hashed(column, keys[number]), shuffle.rows)
                row = (row + shift) % shuffle.rows
        cell = row * shuffle.columns + column
        # Few cells lie behind the last sample, one in sqrt(size): they go through once more.
        if cell < shuffle.size:
            return cell


def mixed(number):
    """Returns SplitMix64's output for 64 bits: 64 bits, each of which depends on all."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def hashed(value, key):
    """Returns the network's hash of 32 bits, of which the upper half is used."""
    value = (value ^ key) * 0x85EBCA6B & 0xFFFFFFFF
    return (value ^ (value >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF


def reduced(number, size):
    """Maps 32 bits to a number below `size`, which is at most 2^16."""
    return (number >> 16) * size >> 16
