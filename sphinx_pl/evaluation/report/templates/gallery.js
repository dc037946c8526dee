document.querySelectorAll("form.filter").forEach(f=>{
 const list=f.nextElementSibling,cards=[...list.querySelectorAll("article")],more=list.nextElementSibling;
 const said=f.querySelector("output"),part=f.part;let most=24;
 const show=()=>{const t=f.task.value,k=f.chosen?f.chosen.value:"",p=part?part.value:"",v=f.outcome.value;let n=0;
  cards.forEach(c=>{const d=c.dataset;c.hidden=(t&&d.task!==t)||(k&&d.chosen!==k)||(p&&d.part!==p)||
   (v==="wrong"?d.outcome!==v&&d.outcome!=="unparsed":v&&d.outcome!==v);if(!c.hidden&&++n>most)c.hidden=true});
  list.querySelectorAll("h3").forEach(h=>{let c=h.nextElementSibling;
   while(c&&c.hidden&&c.tagName!=="H3")c=c.nextElementSibling;h.hidden=!c||c.tagName==="H3"});
  more.hidden=n<=most;
  said.textContent=n?Math.min(n,most)+" of "+n:"none of these answers: choose something else"};
 more.addEventListener("click",()=>{most+=24;show()});
 f.addEventListener("change",e=>{most=24;if(part&&e.target===f.task){part.value="";
  part.querySelectorAll("optgroup").forEach(g=>g.hidden=g.disabled=!!f.task.value&&g.label!==f.task.value)}show()});
 show()})
