// Asks the gateway through OpenAI's SDK for Node in its defaults, and prints what it got as JSON.
import OpenAI, { AzureOpenAI } from 'openai';

const { baseURL, apiKey, model, slashed, texts, slow } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL, apiKey });
const results = {};

async function note(name, ask) {
  try {
    results[name] = { value: await ask() };
  } catch (error) {
    const { status, code, type, param, message, requestID } = error;
    results[name] = { error: { class: error.constructor.name, status, code, type, param, message, requestID } };
  }
}

const create = (body, options) => client.embeddings.create({ model, ...body }, options);
const other = (options) => new OpenAI({ baseURL, apiKey, ...options });

await note('default', () => create({ input: texts }));
await note('string', () => create({ input: texts[0] }));
await note('float', () => create({ input: texts, encoding_format: 'float' }));
await note('base64', () => create({ input: texts, encoding_format: 'base64' }));
await note('dimensions', () => create({ input: texts, dimensions: 256, user: 'user-1' }));
await note('slashed', () => create({ model: slashed, input: texts }));
await note('ids', () => create({ input: [[15339, 1917], [9906]] }));
await note('raw', async () => {
  const { data, response, request_id } = await create({ input: 'hi' }).withResponse();
  return { data, request_id, header: response.headers.get('x-request-id') };
});
await note('base', () => other({ baseURL: baseURL.replace(/v1$/, '') }).embeddings.create({ model, input: 'hi' }));
await note('slash', () => other({ baseURL: `${baseURL}/` }).embeddings.create({ model, input: 'hi' }));

await note('models', async () => (await client.models.list()).data);
await note('retrieve', () => client.models.retrieve(slashed));
await note('retrieve unknown', () => client.models.retrieve('gpt/none'));

await note('wrong key', () => other({ apiKey: 'sk-wrong' }).embeddings.create({ model, input: 'hi' }));
await note('unknown model', () => create({ model: 'text-embedding-9', input: 'hi' }));
await note('null model', () => create({ model: null, input: 'hi' }));
await note('empty string', () => create({ input: '' }));
await note('empty list', () => create({ input: [] }));
await note('slow down', () => create({ input: slow }, { maxRetries: 0 }));
await note('quota', () => create({ input: 'quota' }));

const large = Array(200).fill('large '.repeat(5000));
await note('wrong key, large body', () => other({ apiKey: 'sk-wrong' }).embeddings.create({ model, input: large }));

const azure = new AzureOpenAI({ endpoint: baseURL.replace(/\/v1$/, ''), apiKey, apiVersion: '2024-10-21' });
await note('azure', () => azure.embeddings.create({ model: slashed, input: texts }));

process.stdout.write(JSON.stringify(results));
