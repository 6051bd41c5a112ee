// Formats numbers and durations as text.

export function count(number, one, many) {
  return `${number} ${number === 1 ? one : many}`;
}

/** Formats an estimated duration in seconds. */
export function about(seconds) {
  return seconds < 1 ? 'less than a second' : `about ${duration(seconds)}`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

/** Formats a measured duration in seconds. */
export function measured(seconds) {
  return seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : duration(seconds);
}

/** Formats a position in the queue. */
export function before(position) {
  return `${count(position, 'picture comes', 'pictures come')} before yours`;
}

export function size({ width, height }) {
  return `${width} × ${height}`;
}
