// Answers questions with companion/live/engine.mjs: node live_runner.mjs ENGINE STATE QUESTIONS -> JSON on stdout.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [engine, stateFile, questionFile] = process.argv.slice(2);
const { open, bytesOf, visible, resize } = await import(pathToFileURL(engine));
const { state, weights } = JSON.parse(readFileSync(stateFile));
const conversation = open(state, weights);
const { questions, texts, resizes, max_new_tokens: maxNewTokens } = JSON.parse(readFileSync(questionFile));
const picture = ({ rgb, width, height }) => ({ data: new Uint8Array(bytesOf(rgb)), width, height });
const answers = questions.map(({ image, turns }) => {
  const seen = conversation.setImage(image && picture(image));
  const began = performance.now();
  const rows = turns.map((question) => {
    const tokens = [], attention = [];
    for (const step of conversation.ask(question, { maxNewTokens })) {
      tokens.push(step.token);
      attention.push(step.attention && Array.from(step.attention));
    }
    return { question, tokens, attention, answer: conversation.turns.at(-1).answer };
  });
  const ids = conversation.promptIds("next");
  const logits = Array.from(
    conversation.model.feed(
      conversation.model.embed(ids, conversation.pixels && conversation.model.encodeImage(conversation.pixels)),
      ids.length,
      conversation.model.newCache(),
    ),
  );
  return { rows, ids, logits, seen: seen && Buffer.from(seen.data).toString("base64"), ms: performance.now() - began };
});
const tokenizer = conversation.tokenizer;
const encoded = texts.map((text) => ({ ids: tokenizer.encode(text), back: tokenizer.decode(tokenizer.encode(text)) }));
const resized = resizes.map(({ image, to }) => Buffer.from(resize(picture(image), ...to).data).toString("base64"));
let occlusion = null;
if (questions.length) {
  const { image, turns } = questions[0];
  conversation.setImage(picture(image));
  const tokens = [...conversation.ask(turns[0], { maxNewTokens })].map((step) => step.token);
  occlusion = { tokens, rows: [...conversation.occlusion(0, tokens)] };
}
process.stdout.write(JSON.stringify({ answers, encoded, resized, occlusion }));
