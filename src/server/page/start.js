// The start of the server: what it is doing before it can draw, and how far it is.

import { about } from './wording.js';

const byId = (id) => document.getElementById(id);

const STAGES = {
  finding: 'The model is being looked for',
  downloading: 'The model is being downloaded',
  loading: 'The model is being loaded',
  warming_up: 'The model is warming up',
};

/** Shows the response of `/health/ready`, or hides the start if it is null. Returns the title. */
export function showStart(start) {
  byId('start').hidden = !start;
  if (!start) return '';
  const title = STAGES[start.stage] ?? 'The server is starting';
  byId('start-title').textContent = title;
  byId('start-text').textContent = progressText(start);
  if (start.progress === undefined) byId('start-bar').removeAttribute('value');
  else byId('start-bar').value = start.progress;
  return title;
}

function progressText({ progress, bytes, total_bytes: total, estimated_rest: rest, elapsed }) {
  if (progress === undefined) return `For ${about(elapsed)} now.`;
  const left = rest === undefined ? '' : `, ${about(rest)} left`;
  return `${Math.floor(progress * 100)} %: ${size(bytes)} of ${size(total)}${left}.`;
}

/** Formats a number of bytes. */
function size(bytes) {
  const [unit, name] = bytes < 1e9 ? [1e6, 'MB'] : [1e9, 'GB'];
  return `${(bytes / unit).toFixed(1)} ${name}`;
}
