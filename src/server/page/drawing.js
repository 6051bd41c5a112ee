// One request for pictures, from the first byte that is sent to the last one that comes.

import { ConnectionError, ServerError, events, post } from './api.js';

/** Each costs device time. */
const PREVIEWS = 6;
/** Seconds between looks at a full queue. */
const LOOK = 3;

/** How long it would take, as the server judges. The prompt stays here until it is to be drawn. */
export async function estimate(settings, signal) {
  const request = { ...settings, prompt: '', seed: undefined };
  const response = await post('v1/images/estimate', JSON.stringify(request), signal);
  return response.json();
}

/**
 * Draws, and tells what happens on the way: `{ stage: 'full' | 'queued' | 'step' | 'preview', … }`.
 * While the queue is full it waits for a place, at most as long as the server says, and asks again.
 *
 * Returns the files as blobs, and the facts that the server gives with them.
 */
export async function draw(settings, signal, tell) {
  for (;;) {
    try {
      return await drawOnce(settings, signal, tell);
    } catch (error) {
      if (error.status !== 429 || error.retryAfter === null) throw error;
      for (let seconds = error.retryAfter; seconds > 0; seconds -= 1) {
        tell({ stage: 'full', message: error.message, seconds });
        await second(signal);
        if (seconds % LOOK === 0 && (await estimate(settings, signal)).accepted) break;
      }
    }
  }
}

function second(signal) {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', abort);
      resolve();
    }, 1000);
    signal.addEventListener('abort', abort, { once: true });
  });
}

async function drawOnce(settings, signal, tell) {
  const response = await post('v1/chat/completions', requestBody(settings), signal);
  let files = null;
  try {
    for await (const data of events(response)) {
      if (data === '[DONE]') continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError({ ...chunk.error, status: chunk.error.code });
      const { progress, choices = [] } = chunk;
      if (progress?.stage === 'preview') {
        tell({ ...progress, file: fileOf(progress.image_url.url) });
      } else if (progress) {
        tell(progress);
      }
      files ??= choices[0]?.delta?.content?.map((part) => fileOf(part.image_url.url));
      if (choices[0]?.finish_reason) return { files, facts: chunk };
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
  }
  throw new ConnectionError('The connection ended before the picture was finished.');
}

function requestBody({ prompt, seed, ...fields }) {
  const body = JSON.stringify({
    messages: [{ role: 'user', content: prompt }],
    stream: true,
    preview_every: Math.max(1, Math.ceil(fields.num_inference_steps / PREVIEWS) || 1),
    ...fields,
  });
  if (seed === '') return body;
  // A seed may have more digits than a number keeps here; what is none is for the server to refuse.
  const digits = /^(0|[1-9]\d*)$/.test(seed) ? seed : JSON.stringify(seed);
  return `${body.slice(0, -1)},"seed":${digits}}`;
}

/** Of a `data:` URL. */
function fileOf(url) {
  const [head, data] = url.split(',');
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: head.slice('data:'.length).split(';')[0] });
}
